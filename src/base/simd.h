// Lets the compiler build one hot loop for several instruction sets and choose at run time.
#pragma once

#if defined(_MSC_VER)
#define CTP_INLINE static __forceinline
#else
#define CTP_INLINE static inline __attribute__((always_inline))
#endif

// Clones are resolved through ifuncs, which sanitizers run before they are set up.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CTP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define CTP_CLONES
#endif
