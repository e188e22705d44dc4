"""Makes the .onnx files beside it, as optimum-onnx writes them.

It wants an older transformers than regraft, so an environment of its own:
``pip install "optimum-onnx==0.1.0" "transformers>=4.56,<4.58" torch``; made with torch 2.15.
"""

import sys
from pathlib import Path

import torch
import transformers as tf
from optimum.exporters.onnx import onnx_export_from_model

VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "intermediate_size": 96,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "eos_token_id": 99,
    "bos_token_id": 98,
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    clip = tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    made = {
        "vitcls": (tf.ViTForImageClassification(tf.ViTConfig(**VISION)), "image-classification"),
        "clip": (tf.CLIPModel(clip), "zero-shot-image-classification"),
    }
    for name, (model, task) in made.items():
        onnx_export_from_model(
            model.eval(), output=folder / name, task=task, do_validation=False, monolith=True
        )
        (folder / name / "model.onnx").rename(folder / f"{name}-optimum.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
