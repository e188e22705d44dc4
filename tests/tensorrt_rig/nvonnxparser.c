/* libnvonnxparser.so.11: forwards to the parser of TensorRT for RTX, in its own version's name. */
#include "forward.h"

int getNvOnnxParserVersion(void) {
    return ((int (*)(void))entry(PARSER, "getNvOnnxParserVersion"))();
}

void *createNvOnnxParser_INTERNAL(void *network, void *logger, int callers) {
    (void)callers;
    return ((void *(*)(void *, void *, int))entry(PARSER, "createNvOnnxParser_INTERNAL"))(
        network, logger, getNvOnnxParserVersion());
}

void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t callers) {
    (void)callers;
    return ((void *(*)(void *, void *, int32_t))entry(PARSER, "createNvOnnxParserRefitter_INTERNAL"))(
        refitter, logger, getNvOnnxParserVersion());
}
