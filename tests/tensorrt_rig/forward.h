/* Shared by the three stand-ins: finds a library that lies beside the stand-in, and one entry in it.

   RTLD_LOCAL keeps the library's own entry points, which have the same names as ours, from taking
   each other's place. Failure ends the process with a line that says what is missing: a call through
   a null pointer would say nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *entry(const char *library, const char *name) {
    Dl_info self;
    char path[4096];
    if (!dladdr((void *)entry, &self)) {
        fprintf(stderr, "rig: dladdr does not know where this library lies\n");
        abort();
    }
    const char *end = strrchr(self.dli_fname, '/');
    int length = end ? (int)(end - self.dli_fname) : 0;
    snprintf(path, sizeof path, "%.*s/%s", length, self.dli_fname, library);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void *found = handle ? dlsym(handle, name) : NULL;
    if (!found) {
        fprintf(stderr, "rig: %s of %s: %s\n", name, path, dlerror());
        abort();
    }
    return found;
}

#define RTX "libtensorrt_rtx.so.1"
#define PARSER "libtensorrt_onnxparser_rtx.so.1"
