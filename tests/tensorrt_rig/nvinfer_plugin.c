/* libnvinfer_plugin.so.11: TensorRT for RTX has no plugins of its own to register. */
#include <stdbool.h>

bool initLibNvInferPlugins(void *logger, const char *space) {
    (void)logger;
    (void)space;
    return true;
}
