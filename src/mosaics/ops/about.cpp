// What a library was compiled for, as the compiler that compiles it with the library says.

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" const char* mosaics_about() {
    return
#if defined(__AVX512F__)
        "AVX-512"
#elif defined(__AVX2__)
        "AVX2"
#elif defined(__AVX__)
        "AVX"
#elif defined(__SSE2__)
        "SSE2"
#elif defined(__ARM_NEON)
        "NEON"
#else
        "vectors of 16 bytes"
#endif
#ifdef _OPENMP
        ", OpenMP, "
#else
        ", no OpenMP (one thread), "
#endif
#if defined(__clang__)
        "Clang " __clang_version__;
#elif defined(__GNUC__)
        "GCC " TEXT(__GNUC__) "." TEXT(__GNUC_MINOR__) "." TEXT(__GNUC_PATCHLEVEL__);
#else
        "unknown compiler";
#endif
}
