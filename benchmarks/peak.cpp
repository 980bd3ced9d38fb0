// What the machine itself can do, on all cores: int8 and float32 multiply-adds from registers, and a streaming read.
// Prints one JSON object. Built by benchmarks/machine.py with -march=native; no input, about 2 s.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds that `work(thread)` takes on all threads at once, best of three.
double best_seconds(int num_threads, const std::function<void(int)>& work) {
    double best = 1e30;
    for (int round = 0; round < 3; ++round) {
        const double start = now();
        std::vector<std::thread> threads;
        for (int t = 0; t < num_threads; ++t) threads.emplace_back(work, t);
        for (auto& thread : threads) thread.join();
        best = std::min(best, now() - start);
    }
    return best;
}

constexpr long kRounds = 20'000'000;

#if defined(__AVX512VNNI__)
void int8_work(int) {
    __m512i sum[12] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
    for (long i = 0; i < kRounds; ++i)
        for (auto& s : sum) { s = _mm512_dpbusd_epi32(s, a, b); asm volatile("" : "+v"(s)); }
}
constexpr double kInt8Macs = 12.0 * 64 * kRounds;
void float_work(int) {
    __m512 sum[12] = {}, a = _mm512_set1_ps(1.0f);
    for (long i = 0; i < kRounds; ++i)
        for (auto& s : sum) { s = _mm512_fmadd_ps(s, a, a); asm volatile("" : "+v"(s)); }
}
constexpr double kFloatMacs = 12.0 * 16 * kRounds;
#elif defined(__AVX2__)
void int8_work(int) {
    __m256i sum[8] = {}, a = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    for (long i = 0; i < kRounds; ++i)
        for (auto& s : sum) {
            s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones));
            asm volatile("" : "+x"(s));
        }
}
constexpr double kInt8Macs = 8.0 * 32 * kRounds;
void float_work(int) {
    __m256 sum[10] = {}, a = _mm256_set1_ps(1.0f);
    for (long i = 0; i < kRounds; ++i)
        for (auto& s : sum) { s = _mm256_fmadd_ps(s, a, a); asm volatile("" : "+x"(s)); }
}
constexpr double kFloatMacs = 10.0 * 8 * kRounds;
#else
void int8_work(int) {}
constexpr double kInt8Macs = 0;
void float_work(int) {}
constexpr double kFloatMacs = 0;
#endif

}  // namespace

int main() {
    const int num_threads = static_cast<int>(std::thread::hardware_concurrency());
    const double int8_s = best_seconds(num_threads, int8_work), float_s = best_seconds(num_threads, float_work);
    constexpr size_t kBytes = size_t{1} << 30;
    auto* data = static_cast<uint64_t*>(std::aligned_alloc(4096, kBytes));
    std::memset(data, 1, kBytes);
    std::atomic<uint64_t> sink{0};
    const size_t words = kBytes / 8 / num_threads;
    const double read_s = best_seconds(num_threads, [&](int t) {
        uint64_t sum[8] = {};
        const uint64_t* p = data + words * t;
        for (size_t i = 0; i < words; i += 8)
            for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
        for (uint64_t s : sum) sink += s;
    });
    std::printf("{\"threads\": %d, \"int8_gmacs\": %.1f, \"float32_gmacs\": %.1f, \"dram_gb_s\": %.2f}\n", num_threads,
                kInt8Macs * num_threads / int8_s / 1e9, kFloatMacs * num_threads / float_s / 1e9, kBytes / read_s / 1e9);
    std::free(data);
}
