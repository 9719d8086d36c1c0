// Stands before CUDA source that is compiled for the host: the threads of a block take turns, from barrier to barrier.

#include <cuda.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __launch_bounds__(most)
#define __shared__ static
#define __syncthreads() meet(__LINE__)
#define __activemask() 0xffffffffu

static float rsqrtf(float x) { return 1 / std::sqrt(x); }

template <typename T>
static T max(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
static T min(T a, T b) {
  return a < b ? a : b;
}

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx;

struct Thread {
  ucontext_t context;  // where it begins
  jmp_buf paused;      // where it goes on
  bool begun;
  std::vector<char> stack;
  Index place;
  int line;  // of the barrier that it waits at, 0 once it has ended
  char said[8];
};
static std::vector<Thread> threads;
static jmp_buf turns;
static size_t current;
static std::function<void()> work;

static void meet(int line) {
  threads[current].line = line;
  if (!_setjmp(threads[current].paused)) _longjmp(turns, 1);
}

template <typename T>
static T exchange(T value, int line, int other) {
  std::memcpy(threads[current].said, &value, sizeof(T));
  meet(line);
  T heard = value;
  if (other >= 0) std::memcpy(&heard, threads[current / 32 * 32 + other].said, sizeof(T));
  meet(-line);
  return heard;
}

static int down(int offset, int width) {
  int lane = current % 32;
  return lane % width + offset < width ? lane + offset : -1;
}

#define __shfl_down_sync(mask, value, offset, width) exchange(value, __LINE__, down(offset, width))
#define __shfl_sync(mask, value, lane, width) exchange(value, __LINE__, int(current % 32 / (width) * (width)) + (lane) % (width))

static void run_one() {
  work();
  threads[current].line = 0;
  _longjmp(turns, 1);
}

static void take_turn() {
  Thread& thread = threads[current];
  if (_setjmp(turns)) return;
  threadIdx = thread.place;
  if (thread.begun) _longjmp(thread.paused, 1);
  thread.begun = true;
  setcontext(&thread.context);
}

static void run_block(const unsigned* block) {
  size_t count = size_t(block[0]) * block[1] * block[2];
  if (threads.size() < count) threads.resize(count);
  for (size_t i = 0; i < count; i++) {
    Thread& thread = threads[i];
    thread.stack.resize(64 << 10);
    thread.place = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
    thread.begun = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, run_one, 0);
  }
  for (bool more = true; more;) {
    for (current = 0; current < count; current++) take_turn();
    for (size_t i = 1; i < count; i++) {
      if (threads[i].line != threads[0].line) {
        std::fprintf(stderr, "threads of a block wait at different barriers\n");
        std::abort();
      }
    }
    more = threads[0].line != 0;
  }
}

static void run_grid(const unsigned* grid, const unsigned* block, bool barriers, std::function<void()> kernel) {
  work = kernel;
  for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
        if (barriers) {
          run_block(block);
          continue;
        }
        for (threadIdx.z = 0; threadIdx.z < block[2]; threadIdx.z++)
          for (threadIdx.y = 0; threadIdx.y < block[1]; threadIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < block[0]; threadIdx.x++) work();
      }
}
