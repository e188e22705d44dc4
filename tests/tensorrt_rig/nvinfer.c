/* libnvinfer.so.11: forwards to TensorRT for RTX, in its own version's name. */
#include "forward.h"

static int32_t version(void) { return ((int32_t(*)(void))entry(RTX, "getInferLibVersion"))(); }

void *createInferBuilder_INTERNAL(void *logger, int32_t callers) {
    (void)callers;
    return ((void *(*)(void *, int32_t))entry(RTX, "createInferBuilder_INTERNAL"))(logger, version());
}

void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t callers) {
    (void)callers;
    return ((void *(*)(void *, void *, int32_t))entry(RTX, "createInferRefitter_INTERNAL"))(
        engine, logger, version());
}

void *createInferRuntime_INTERNAL(void *logger, int32_t callers) {
    (void)callers;
    return ((void *(*)(void *, int32_t))entry(RTX, "createInferRuntime_INTERNAL"))(logger, version());
}

void *getBuilderPluginRegistry(int32_t capability) {
    return ((void *(*)(int32_t))entry(RTX, "getBuilderPluginRegistry"))(capability);
}

void *getPluginRegistry(void) { return ((void *(*)(void))entry(RTX, "getPluginRegistry"))(); }
