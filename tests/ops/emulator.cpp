// Calls functions of libraries on another processor: requests come on standard input, what is in the buffers afterwards
// goes to standard output. All are int64, but for text and the bytes of buffers.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

static void take(void* to, size_t count) {
    if (count && std::fread(to, 1, count, stdin) != count) std::exit(0);  // nothing more is asked
}

static int64_t number() {
    int64_t x;
    take(&x, sizeof x);
    return x;
}

static std::string text() {
    std::string found(number(), ' ');
    take(&found[0], found.size());
    return found;
}

template <size_t... I>
static void call(void* function, const int64_t* x, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(decltype(x[I] + 0)...)>(function)(x[I]...);
}

int main() {
    std::map<std::string, void*> libraries;
    for (;;) {
        const std::string path = text(), name = text();
        void*& library = libraries[path];
        if (!library) library = dlopen(path.c_str(), RTLD_NOW);
        void* function = library ? dlsym(library, name.c_str()) : nullptr;
        if (!function) {
            std::fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        std::vector<std::vector<char>> buffers(number());
        for (auto& buffer : buffers) {
            buffer.resize(number());
            take(buffer.data(), buffer.size());
        }
        int64_t given[32] = {};
        const int64_t count = number();
        for (int64_t i = 0; i < count; i++) {
            const int64_t buffer = number(), value = number();  // an address in a buffer, or without one a number
            given[i] = buffer < 0 ? value : reinterpret_cast<int64_t>(buffers[buffer].data() + value);
        }
        call(function, given, std::make_index_sequence<32>());
        for (const auto& buffer : buffers) std::fwrite(buffer.data(), 1, buffer.size(), stdout);
        std::fflush(stdout);
    }
}
