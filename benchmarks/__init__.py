"""Measurements of regraft: interleaved in one run, as ratios, with the outputs checked."""
