// Runs one compute dispatch on a CPU. Every thread of a threadgroup is a fibre; SIMD-group functions
// and barriers are the places where fibres meet. Kernels compiled with checks call back at every
// load, store and copy that is left after optimisation (the calls of -fsanitize=address, without its
// library and its shadow memory) and where C++ is undefined (-fsanitize=alignment,bounds,...).
//
// Uses the C library and POSIX threads only, so that any C++ compiler builds it without its library.
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
#define MSL_ASSEMBLY  // switches fibres with a few instructions, else with ucontext
#endif

namespace {
typedef uint32_t u32;
typedef uint64_t u64;

const u32 SIMD = 32;
const u64 PAGE = 16384;  // at least the page of every system
const u64 STACK = 256 << 10;
const u64 SLOT = 4ull << 30;  // addresses set aside for a buffer
const int SLOTS = 64;
const u64 GROUP_MEMORY = 128 << 10;  // limit, and room between arrays
const int MAX_ARRAYS = 96;
const u64 RED_ZONE = 256;
const u32 MIXED = 0xffffffff;
const u64 MAX_STRIDE = 40000000;  // checked accesses of one thread between meetings

// What an entry function reads: see ATTRIBUTES in source.py.
struct Ids {
  u32 thread_in_grid[3], thread_in_group[3], group_in_grid[3], group_size[3], dispatch_size[3];
  u32 groups[3], grid[3], index, lane, simdgroup, simdgroups, dispatch_simdgroups;
};
typedef void (*Entry)(void** arguments, const Ids* ids);

// What is known of the accesses to one granule of memory.
struct Cell {
  u32 write_group, write_thread, write_simdgroup, write_epoch, write_simd_epoch;
  u32 read_group, read_thread, read_simdgroup, read_epoch, read_simd_epoch;
  unsigned char written, atomic, read;
};

struct Buffer {
  char* low;
  u64 bytes;
  u32 granule;   // 0: accesses are not tracked
  u32 writable;  // 0: no writes
  u32 written;   // its contents count as written
  Cell* cells;
};

struct Launch {
  Entry entry;
  void** arguments;
  Buffer* buffers;
  char *image_low, *image_high;
  u64 group_memory;
  int num_buffers, check, order, workers, lockstep;
  u32 grid[3], group[3];
};

struct Statistics {
  u64 switches, meetings, accesses, group_memory;
};

enum State { RUNNING, AT_SIMD, AT_BARRIER, RETURNED };

struct Fibre {
  void* stack_pointer;
  char* stack;
  int state, kind, line, source;
  u64 value[2];
  float matrices[6];
  Ids ids;
#ifndef MSL_ASSEMBLY
  ucontext_t context;
#endif
};

struct Simdgroup {
  int arrived, kind, line;
  u32 first, size;
  u32 group_epoch, device_epoch;  // raised by simdgroup_barrier
};

struct Array {
  char* low;
  u64 bytes;
  u32 granule;
  int id;
  const char* name;
};

struct Worker {
  Launch* launch;
  Fibre* fibres;
  u32 allocated;
  Simdgroup simdgroups[SIMD];
  void* main_stack_pointer;
  Fibre* current;
  u32 size, live, at_barrier, group, turn;
  int barrier_line;
  u32 group_epoch, device_epoch;
  char* memory;
  Cell* memory_cells;
  u64 memory_used, memory_end, cells_end;
  Array arrays[MAX_ARRAYS];
  int num_arrays;
  bool stopped;
  u64 stride;
  Statistics statistics;
#ifndef MSL_ASSEMBLY
  ucontext_t main_context;
#endif
};

thread_local Worker* self;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
int errors;
char message[1 << 15];
Statistics total_statistics;
struct sigaction previous_action;
char* arena;

// ---- reports -----------------------------------------------------------------------------------
// "@0x..." in a report is an address in the kernel, "buffer N" an argument: both are named in Python.
void report(const void* address, const char* format, ...) {
  pthread_mutex_lock(&lock);
  if (errors++ < 8) {
    size_t length = strlen(message);
    va_list list;
    va_start(list, format);
    length += vsnprintf(message + length, 1000, format, list);
    va_end(list);
    if (self && self->current) {
      const Ids& ids = self->current->ids;
      length +=
          snprintf(message + length, 200,
                   " [threadgroup (%u,%u,%u) thread %u simdgroup %u lane %u]", ids.group_in_grid[0],
                   ids.group_in_grid[1], ids.group_in_grid[2], ids.index, ids.simdgroup, ids.lane);
    }
    if (address) {
      length += snprintf(message + length, 60, " @0x%lx", (unsigned long)address);
    }
    strcpy(message + length, "\n");
  }
  pthread_mutex_unlock(&lock);
}

// ---- fibres ------------------------------------------------------------------------------------
#ifdef MSL_ASSEMBLY
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
msl_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

void to_main() {
  Worker* w = self;
  w->statistics.switches++;
#ifdef MSL_ASSEMBLY
  msl_switch(&w->current->stack_pointer, w->main_stack_pointer);
#else
  swapcontext(&w->current->context, &w->main_context);
#endif
}

// The thread whose turn is the j-th.
u32 in_turn(const Worker* w, u32 j) {
  const u32 n = w->size;
  const int order = w->launch->order;
  return order == 0 ? j : order == 1 ? n - 1 - j : u32((u64(j) * 7919 + u32(order)) % n);
}

// The next thread that can run, from a turn on; nullptr if there is none in this round.
Fibre* next_in_turn(Worker* w, u32 j) {
  for (; j < w->size; j++) {
    Fibre* fibre = &w->fibres[in_turn(w, j)];
    if (fibre->state == RUNNING) {
      w->turn = j;
      return fibre;
    }
  }
  return nullptr;
}

void to_fibre(Worker* w, Fibre* fibre) {
  w->current = fibre;
  w->stride = 0;
  w->statistics.switches++;
#ifdef MSL_ASSEMBLY
  msl_switch(&w->main_stack_pointer, fibre->stack_pointer);
#else
  swapcontext(&w->main_context, &fibre->context);
#endif
}

// The current thread waits: on with the next, without the detour over the main stack.
__attribute__((noinline)) void wait() {
  Worker* w = self;
  Fibre* fibre = w->current;
  Fibre* next = next_in_turn(w, w->turn + 1);
  if (!next) {
    to_main();
    return;
  }
  w->current = next;
  w->stride = 0;
  w->statistics.switches++;
#ifdef MSL_ASSEMBLY
  msl_switch(&fibre->stack_pointer, next->stack_pointer);
#else
  swapcontext(&fibre->context, &next->context);
#endif
}

[[noreturn]] void stop() {
  self->stopped = true;
  to_main();
  abort();
}

void fibre_main() {
  for (;;) {
    Worker* w = self;
    w->launch->entry(w->launch->arguments, &w->current->ids);
    w = self;
    w->current->state = RETURNED;
    w->live--;
    wait();
  }
}

void prepare(Fibre& fibre) {
#ifdef MSL_ASSEMBLY
  void** top = reinterpret_cast<void**>(fibre.stack + STACK - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fibre_main);
  for (int i = 0; i < 6; i++) {
    *--top = nullptr;
  }
  fibre.stack_pointer = top;
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = STACK;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, fibre_main, 0);
#endif
}

void* map(u64 bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    fprintf(stderr, "kernel runner: no address space for %lu bytes\n", (unsigned long)bytes);
    abort();
  }
  return at;
}

// The buffer that an address out of all of them is nearest to.
int nearest(const Launch* l, const char* p) {
  int best = -1;
  u64 distance = ~0ull;
  for (int i = 0; i < l->num_buffers; i++) {
    const Buffer& b = l->buffers[i];
    const u64 d = p < b.low ? u64(b.low - p) : p >= b.low + b.bytes ? u64(p - b.low - b.bytes) : 0;
    if (d < distance) {
      distance = d;
      best = i;
    }
  }
  return best;
}

// An access that no callback sees (checks off, or a copy of a large struct) ends in a guard page.
void on_fault(int, siginfo_t* information, void* context) {
  Worker* w = self;
  if (!w || !w->current || w->stopped) {
    sigaction(SIGSEGV, &previous_action, nullptr);
    return;
  }
  const char* p = static_cast<char*>(information->si_addr);
  const void* address = nullptr;
#if defined(__x86_64__) && defined(__linux__)
  address = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[16] +
                                    1);  // REG_RIP
#else
  (void)context;
#endif
  const u64 below = u64(w->current->stack - p);
  const int i = nearest(w->launch, p);
  if (below <= PAGE) {
    report(address, "stack overflow: thread variables take more than %lu bytes", (long)STACK);
  } else if (i < 0) {
    report(address, "memory fault");
  } else {
    const Buffer& b = w->launch->buffers[i];
    report(address,
           "out-of-bounds access (memory fault): byte offset %ld in buffer %d of %lu bytes",
           (long)(p - b.low), i, (unsigned long)b.bytes);
  }
  stop();
}

// ---- SIMD-group functions ----------------------------------------------------------------------
float from_half(uint16_t bits) {
  __fp16 value;
  memcpy(&value, &bits, 2);
  return value;
}
uint16_t to_half(float x) {
  const __fp16 value = x;
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}
float from_bfloat(uint16_t bits) {
  const u32 wide = u32(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}
uint16_t to_bfloat(float x) {
  u32 u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) {
    return 0x7fc0;
  }
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

enum Operation {
  SUM,
  MAX,
  MIN,
  PRODUCT,
  AND,
  OR,
  XOR,
  SCAN,
  SCAN_BEFORE,
  PRODUCTS,
  PRODUCTS_BEFORE
};

template <class T>
struct Plain {
  static T read(const void* from) {
    T x;
    memcpy(&x, from, sizeof(T));
    return x;
  }
  static void write(void* to, T x) { memcpy(to, &x, sizeof(T)); }
  static T bits(T x, T y, int operation) {
    return T(operation == AND ? x & y : operation == OR ? x | y : x ^ y);
  }
  static T round(T x) { return x; }
};
template <float (*FROM)(uint16_t), uint16_t (*TO)(float)>
struct Narrow {
  static float read(const void* from) {
    uint16_t bits;
    memcpy(&bits, from, 2);
    return FROM(bits);
  }
  static void write(void* to, float x) {
    const uint16_t bits = TO(x);
    memcpy(to, &bits, 2);
  }
  static float bits(float x, float, int) { return x; }
  static float round(float x) { return FROM(TO(x)); }
};
template <>
float Plain<float>::bits(float x, float, int) {
  return x;
}

// Pairwise, as a machine would do it; rounds to the type at every step.
template <class F, class T>
void reduce(Fibre** fibres, int n, int operation) {
  T v[SIMD], result[SIMD];
  for (int i = 0; i < n; i++) {
    v[i] = F::read(fibres[i]->value);
  }
  if (operation >= SCAN) {
    const bool products = operation >= PRODUCTS;
    const bool before = operation == SCAN_BEFORE || operation == PRODUCTS_BEFORE;
    T running = products ? T(1) : T(0);
    for (int i = 0; i < n; i++) {
      const T next = F::round(products ? T(running * v[i]) : T(running + v[i]));
      result[i] = before ? running : next;
      running = next;
    }
  } else {
    for (int left = n; left > 1; left = (left + 1) / 2) {
      const int half = (left + 1) / 2;
      for (int i = 0; i + half < left; i++) {
        const T x = v[i], y = v[i + half];
        switch (operation) {
          case SUM:
            v[i] = F::round(T(x + y));
            break;
          case PRODUCT:
            v[i] = F::round(T(x * y));
            break;
          case MAX:
            v[i] = x != x ? y : (x < y ? y : x);
            break;
          case MIN:
            v[i] = x != x ? y : (y < x ? y : x);
            break;
          default:
            v[i] = F::bits(x, y, operation);
        }
      }
    }
    for (int i = 0; i < n; i++) {
      result[i] = v[0];
    }
  }
  for (int i = 0; i < n; i++) {
    F::write(fibres[i]->value, result[i]);
  }
}

// Kinds of meeting. Those below 10 are shuffles: see msl_cpu.h.
enum Kind {
  BROADCAST_FIRST = 2,
  DOWN = 4,
  UP = 5,
  BALLOT = 10,
  MULTIPLY = 11,
  BARRIER = 30,
  REDUCE = 100
};

const char* name_of(int kind) {
  static const char* shuffles[] = {
      "simd_shuffle",      "simd_broadcast",  "simd_broadcast_first", "simd_shuffle_xor",
      "simd_shuffle_down", "simd_shuffle_up", "a quadgroup function"};
  return kind < 7           ? shuffles[kind]
         : kind == BALLOT   ? "simd_any, simd_all or simd_ballot"
         : kind == MULTIPLY ? "simdgroup_multiply"
         : kind < BARRIER   ? "a simdgroup function"
         : kind < REDUCE    ? "simdgroup_barrier"
                            : "a simdgroup reduction";
}

void shuffle(Fibre** fibres, int n, int kind, int line) {
  u64 result[SIMD][2];
  for (int i = 0; i < n; i++) {
    const int source = kind == BROADCAST_FIRST ? 0 : fibres[i]->source;
    const Fibre* from = source >= 0 && source < n ? fibres[source] : nullptr;
    if (!from && kind != DOWN && kind != UP) {
      self->current = fibres[i];
      report(nullptr, "%s of line %d reads lane %d, which is not there", name_of(kind), line,
             source);
      stop();
    }
    memcpy(result[i], from ? from->value : fibres[i]->value,
           16);  // up, down: own value at the edge
  }
  for (int i = 0; i < n; i++) {
    memcpy(fibres[i]->value, result[i], 16);
  }
}

u32 matrix_row(u32 lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
u32 matrix_column(u32 lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

void multiply(Fibre** fibres, int n, int line) {
  if (n != int(SIMD)) {
    report(nullptr, "simdgroup_multiply of line %d in a simdgroup of %d threads", line, n);
    stop();
  }
  float a[8][8], b[8][8];
  for (int i = 0; i < n; i++) {
    const u32 row = matrix_row(i), column = matrix_column(i);
    for (int j = 0; j < 2; j++) {
      a[row][column + j] = fibres[i]->matrices[j];
      b[row][column + j] = fibres[i]->matrices[2 + j];
    }
  }
  for (int i = 0; i < n; i++) {
    const u32 row = matrix_row(i), column = matrix_column(i);
    for (int j = 0; j < 2; j++) {
      float sum = fibres[i]->matrices[4 + j];
      for (int k = 0; k < 8; k++) {
        sum = fmaf(a[row][k], b[k][column + j], sum);
      }
      fibres[i]->matrices[4 + j] = sum;
    }
  }
}

void resolve(Simdgroup& s) {
  Worker* w = self;
  Fibre* fibres[SIMD];
  const int n = int(s.size);
  for (int i = 0; i < n; i++) {
    fibres[i] = &w->fibres[s.first + i];
  }
  w->statistics.meetings++;
  if (s.kind >= REDUCE) {
    const int type = (s.kind - REDUCE) / 16, operation = (s.kind - REDUCE) % 16;
    switch (type) {
      case 0:
        reduce<Plain<float>, float>(fibres, n, operation);
        break;
      case 1:
        reduce<Narrow<from_half, to_half>, float>(fibres, n, operation);
        break;
      case 2:
        reduce<Narrow<from_bfloat, to_bfloat>, float>(fibres, n, operation);
        break;
      case 3:
        reduce<Plain<int>, int>(fibres, n, operation);
        break;
      case 4:
        reduce<Plain<u32>, u32>(fibres, n, operation);
        break;
      case 5:
        reduce<Plain<short>, short>(fibres, n, operation);
        break;
      case 6:
        reduce<Plain<uint16_t>, uint16_t>(fibres, n, operation);
        break;
      case 7:
        reduce<Plain<signed char>, signed char>(fibres, n, operation);
        break;
      default:
        reduce<Plain<unsigned char>, unsigned char>(fibres, n, operation);
    }
  } else if (s.kind < BALLOT) {
    shuffle(fibres, n, s.kind, s.line);
  } else if (s.kind == BALLOT) {
    u64 votes = 0;
    for (int i = 0; i < n; i++) {
      votes |= (fibres[i]->value[0] & 1) << fibres[i]->ids.lane;
    }
    for (int i = 0; i < n; i++) {
      fibres[i]->value[0] = votes;
    }
  } else if (s.kind == MULTIPLY) {
    multiply(fibres, n, s.line);
  }
  const int flags = s.kind >= BARRIER && s.kind < REDUCE ? s.kind - BARRIER
                    : w->launch->lockstep                ? 3
                                                         : 0;
  s.device_epoch += flags & 1;
  s.group_epoch += flags >> 1 & 1;
  for (int i = 0; i < n; i++) {
    fibres[i]->state = RUNNING;
  }
  s.arrived = 0;
}

void meet(int kind, int line) {
  Worker* w = self;
  Fibre* fibre = w->current;
  Simdgroup& s = w->simdgroups[fibre->ids.simdgroup];
  if (s.arrived == 0) {
    s.kind = kind;
    s.line = line;
  } else if (s.kind != kind || s.line != line) {
    report(nullptr,
           "divergent SIMD-group functions: lanes of one simdgroup are at %s of line %d and %s of "
           "line %d",
           name_of(s.kind), s.line, name_of(kind), line);
    stop();
  }
  fibre->kind = kind;
  fibre->line = line;
  fibre->state = AT_SIMD;
  if (++s.arrived == int(s.size)) {
    resolve(s);
  } else {
    wait();
  }
}

// ---- memory checks -----------------------------------------------------------------------------
enum Access { READ = 0, UPDATE = 1, WRITE = 2 };  // as msl_atomic's kinds

struct Me {
  u32 group, thread, simdgroup, epoch, simd_epoch;
};

bool after_write(const Cell& c, const Me& me) {
  return !c.written || !c.write_thread ||
         (c.write_group == me.group &&
          (c.write_thread == me.thread || c.write_epoch < me.epoch ||
           (c.write_simdgroup == me.simdgroup && c.write_simd_epoch < me.simd_epoch)));
}

bool after_reads(const Cell& c, const Me& me) {
  return !c.read || (c.read_group == me.group &&
                     (c.read_thread == me.thread || c.read_epoch < me.epoch ||
                      (c.read_simdgroup == me.simdgroup && c.read_simd_epoch < me.simd_epoch)));
}

void note_read(Cell& c, const Me& me) {
  const bool same_group = !c.read || c.read_group == me.group;
  const bool fresh = !c.read || (same_group && c.read_epoch < me.epoch);
  const bool same_simdgroup = fresh || c.read_simdgroup == me.simdgroup;
  const bool fresher = fresh || (same_simdgroup && c.read_simd_epoch < me.simd_epoch);
  c.read = 1;
  c.read_group = same_group ? me.group : MIXED;
  c.read_simdgroup = same_simdgroup ? me.simdgroup : MIXED;
  c.read_thread = fresher || c.read_thread == me.thread ? me.thread : MIXED;
  c.read_epoch = me.epoch;
  c.read_simd_epoch = me.simd_epoch;
}

void note_write(Cell& c, const Me& me, bool atomic) {
  // Several atomic writers with no order among them: nothing later is ordered by one of them alone.
  const bool joins = atomic && c.atomic && c.written && !after_write(c, me);
  c.write_simdgroup = joins && c.write_simdgroup != me.simdgroup ? MIXED : me.simdgroup;
  c.write_group = joins && c.write_group != me.group ? MIXED : me.group;
  c.write_thread = joins ? MIXED : me.thread;
  c.written = 1;
  c.atomic = atomic;
  c.write_epoch = me.epoch;
  c.write_simd_epoch = me.simd_epoch;
  c.read = 0;
}

struct Place {
  const char* kind;
  const char* name;  // of a threadgroup array
  int buffer;
  u64 offset;
};

[[noreturn]] void race(const Place& place,
                       Access access,
                       const Cell& c,
                       const Me& me,
                       bool with_write,
                       const void* address) {
  char other[80];
  const u32 group = with_write ? c.write_group : c.read_group;
  const u32 thread = with_write ? c.write_thread : c.read_thread;
  if (group == MIXED || thread == MIXED) {
    snprintf(other, sizeof other, "several threads");
  } else if (group != me.group) {
    snprintf(other, sizeof other, "thread %u of threadgroup number %u", thread - 1, group - 1);
  } else {
    snprintf(other, sizeof other, "thread %u", thread - 1);
  }
  char name[120];
  if (place.name) {
    snprintf(name, sizeof name, "threadgroup '%s'", place.name);
  } else {
    snprintf(name, sizeof name, "buffer %d", place.buffer);
  }
  report(address, "race on %s byte %lu: %s after a %s by %s with no barrier between", name,
         (unsigned long)place.offset, access == READ ? "read" : "write",
         with_write ? "write" : "read", other);
  stop();
}

void check_cell(
    Cell& c, Access access, bool atomic, const Me& me, const Place& place, const void* address) {
  if (access != WRITE && !c.written) {
    if (place.name) {
      report(address, "read of uninitialised threadgroup '%s' byte %lu", place.name,
             (unsigned long)place.offset);
    } else {
      report(address, "read of uninitialised buffer %d byte %lu", place.buffer,
             (unsigned long)place.offset);
    }
    stop();
  }
  if (!(atomic && c.atomic) && !after_write(c, me)) {
    race(place, access, c, me, true, address);
  }
  if (access != READ && !after_reads(c, me)) {
    race(place, access, c, me, false, address);
  }
  if (access == READ) {
    if (!atomic) {
      note_read(c, me);
    }
  } else {
    note_write(c, me, atomic);
  }
}

__attribute__((noinline)) void check(
    const char* p, u64 n, Access access, bool atomic, const void* address) {
  Worker* w = self;
  Fibre* fibre = w->current;
  Launch* l = w->launch;
  w->statistics.accesses++;
  if (++w->stride > MAX_STRIDE) {
    report(address, "a thread does not end");
    stop();
  }
  const Simdgroup& s = w->simdgroups[fibre->ids.simdgroup];
  Me me = {w->group + 1, fibre->ids.index + 1, fibre->ids.simdgroup, w->device_epoch,
           s.device_epoch};
  const char* verb = access == READ ? "read" : "write";
  if (p >= w->memory && p < w->memory + GROUP_MEMORY) {
    me.epoch = w->group_epoch;
    me.simd_epoch = s.group_epoch;
    for (int i = 0; i < w->num_arrays; i++) {
      const Array& array = w->arrays[i];
      if (p < array.low || p + n > array.low + array.bytes) {
        continue;
      }
      Cell* cells = w->memory_cells + (array.low - w->memory);
      const u64 first = u64(p - array.low) / array.granule;
      const u64 last = (u64(p - array.low) + n - 1) / array.granule;
      for (u64 g = first; g <= last; g++) {
        check_cell(cells[g], access, atomic, me, {"threadgroup", array.name, 0, g * array.granule},
                   address);
      }
      return;
    }
    int best = -1;
    for (int i = 0; i < w->num_arrays; i++) {
      if (w->arrays[i].low <= p) {
        best = best < 0 || w->arrays[i].low > w->arrays[best].low ? i : best;
      }
    }
    if (best < 0) {
      report(address, "out-of-bounds %s of %lu bytes before all threadgroup arrays", verb, (long)n);
    } else {
      report(address,
             "out-of-bounds %s of %lu bytes at byte %ld of threadgroup '%s', which has %lu bytes",
             verb, (long)n, (long)(p - w->arrays[best].low), w->arrays[best].name,
             (long)w->arrays[best].bytes);
    }
    stop();
  }
  const int i = p >= arena && p < arena + SLOT * SLOTS ? int((p - arena) / SLOT) : nearest(l, p);
  if (i >= 0 && i < l->num_buffers) {
    Buffer& b = l->buffers[i];
    if (p >= b.low && p + n <= b.low + b.bytes) {
      if (access != READ && !b.writable) {
        report(address, "write to buffer %d, an input, at byte %ld", i, (long)(p - b.low));
        stop();
      }
      if (b.cells) {
        const u64 last = (u64(p - b.low) + n - 1) / b.granule;
        for (u64 g = u64(p - b.low) / b.granule; g <= last; g++) {
          Cell& c = b.cells[g];
          if (!c.written && b.written) {
            c.written = 1;
          }
          check_cell(c, access, atomic, me, {"buffer", nullptr, i, g * b.granule}, address);
        }
      }
      return;
    }
  }
  if (access == READ && p >= l->image_low && p + n <= l->image_high) {
    return;  // a constant of the program
  }
  const int near = nearest(l, p);
  const long limit = long(SLOT / 2);
  if (near < 0 || p - l->buffers[near].low > limit || l->buffers[near].low - p > limit) {
    report(address, "out-of-bounds %s of %lu bytes, far from every buffer", verb, (long)n);
  } else {
    const Buffer& b = l->buffers[near];
    report(address, "out-of-bounds %s of %lu bytes: byte offset %ld in buffer %d of %lu bytes",
           verb, (long)n, (long)(p - b.low), near, (long)b.bytes);
  }
  stop();
}

inline bool on_stack(const void* p) {
  return u64(static_cast<const char*>(p) - self->current->stack) < STACK;
}

// ---- one threadgroup ---------------------------------------------------------------------------
void describe_deadlock(Worker* w) {
  char text[600] = "";
  size_t length = 0;
  int shown = 0;
  for (u32 i = 0; i < w->size;) {
    const Fibre& f = w->fibres[i];
    u32 j = i;
    while (j < w->size && w->fibres[j].state == f.state &&
           (f.state == RETURNED || w->fibres[j].line == f.line)) {
      j++;
    }
    if (++shown <= 6) {
      const char* where = f.state == RETURNED     ? "have returned"
                          : f.state == AT_BARRIER ? "wait in threadgroup_barrier"
                                                  : name_of(f.kind);
      length += snprintf(text + length, sizeof text - length, "; threads %u-%u %s%s", i, j - 1,
                         f.state == AT_SIMD ? "wait in " : "", where);
      if (f.state != RETURNED) {
        length += snprintf(text + length, sizeof text - length, " of line %d", f.line);
      }
    }
    i = j;
  }
  w->current = nullptr;
  report(nullptr, "divergent barrier or SIMD-group function in threadgroup number %u%s%s", w->group,
         text, shown > 6 ? "; ..." : "");
  w->stopped = true;
}

void grow(Worker* w, u32 size) {
  if (w->allocated >= size) {
    return;
  }
  w->fibres = static_cast<Fibre*>(realloc(static_cast<void*>(w->fibres), sizeof(Fibre) * size));
  for (; w->allocated < size; w->allocated++) {
    Fibre* fibre = &w->fibres[w->allocated];
    memset(static_cast<void*>(fibre), 0, sizeof(Fibre));
    char* stack = static_cast<char*>(map(STACK + PAGE, PROT_NONE));
    mprotect(stack + PAGE, STACK, PROT_READ | PROT_WRITE);
    fibre->stack = stack + PAGE;
  }
}

void run_group(Worker* w, const u32* at) {
  Launch* l = w->launch;
  u32 size[3], groups[3];
  for (int i = 0; i < 3; i++) {
    groups[i] = (l->grid[i] + l->group[i] - 1) / l->group[i];
    const u32 left = l->grid[i] - at[i] * l->group[i];  // the last group may be smaller
    size[i] = left < l->group[i] ? left : l->group[i];
  }
  const u32 n = size[0] * size[1] * size[2];
  const u32 full = l->group[0] * l->group[1] * l->group[2];
  if (w->memory_end) {
    memset(w->memory, 0xff, w->memory_end);
  }
  if (w->cells_end) {
    memset(static_cast<void*>(w->memory_cells), 0, sizeof(Cell) * w->cells_end);
  }
  w->size = w->live = n;
  w->at_barrier = w->group_epoch = w->device_epoch = 0;
  w->memory_used = w->memory_end = w->cells_end = 0;
  w->num_arrays = 0;
  w->group = at[0] + groups[0] * (at[1] + groups[1] * at[2]);
  memset(w->simdgroups, 0, sizeof w->simdgroups);
  grow(w, n);
  for (u32 i = 0; i < n; i++) {
    Fibre& fibre = w->fibres[i];
    Ids& d = fibre.ids;
    const u32 position[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int k = 0; k < 3; k++) {
      d.thread_in_group[k] = position[k];
      d.group_in_grid[k] = at[k];
      d.thread_in_grid[k] = at[k] * l->group[k] + position[k];
      d.group_size[k] = size[k];
      d.dispatch_size[k] = l->group[k];
      d.groups[k] = groups[k];
      d.grid[k] = l->grid[k];
    }
    d.index = i;
    d.lane = i % SIMD;
    d.simdgroup = i / SIMD;
    d.simdgroups = (n + SIMD - 1) / SIMD;
    d.dispatch_simdgroups = (full + SIMD - 1) / SIMD;
    Simdgroup& s = w->simdgroups[i / SIMD];
    s.first = s.size ? s.first : i;
    s.size++;
    fibre.state = RUNNING;
    prepare(fibre);
  }
  while (w->live && !w->stopped) {
    Fibre* first = next_in_turn(w, 0);
    if (first) {
      to_fibre(w, first);
    } else {
      describe_deadlock(w);
    }
  }
}

struct Task {
  Launch* launch;
  u64 next, total;
};

Worker* workers[16];
int next_worker;

void* work(void* argument) {
  Task* task = static_cast<Task*>(argument);
  Launch* l = task->launch;
  pthread_mutex_lock(&lock);
  const int id = next_worker++;
  pthread_mutex_unlock(&lock);
  Worker* w = workers[id];
  if (!w) {
    w = workers[id] = static_cast<Worker*>(calloc(1, sizeof(Worker)));
    w->memory = static_cast<char*>(map(GROUP_MEMORY, PROT_READ | PROT_WRITE));
    w->memory_cells = static_cast<Cell*>(map(sizeof(Cell) * GROUP_MEMORY, PROT_READ | PROT_WRITE));
    w->memory_end = GROUP_MEMORY;
  }
  stack_t alternate, before;
  alternate.ss_sp = malloc(1 << 16);
  alternate.ss_size = 1 << 16;
  alternate.ss_flags = 0;
  sigaltstack(&alternate, &before);
  self = w;
  w->current = nullptr;
  w->launch = l;
  w->stopped = false;
  w->stride = 0;
  memset(&w->statistics, 0, sizeof w->statistics);
  u32 groups[3];
  for (int i = 0; i < 3; i++) {
    groups[i] = (l->grid[i] + l->group[i] - 1) / l->group[i];
  }
  while (!__atomic_load_n(&errors, __ATOMIC_RELAXED)) {
    const u64 g = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED);
    if (g >= task->total) {
      break;
    }
    const u32 at[3] = {u32(g % groups[0]), u32(g / groups[0] % groups[1]),
                       u32(g / (u64(groups[0]) * groups[1]))};
    run_group(w, at);
  }
  w->current = nullptr;
  self = nullptr;
  sigaltstack(&before, nullptr);
  free(alternate.ss_sp);
  pthread_mutex_lock(&lock);
  total_statistics.switches += w->statistics.switches;
  total_statistics.meetings += w->statistics.meetings;
  total_statistics.accesses += w->statistics.accesses;
  if (w->statistics.group_memory > total_statistics.group_memory) {
    total_statistics.group_memory = w->statistics.group_memory;
  }
  pthread_mutex_unlock(&lock);
  return nullptr;
}
}  // namespace

// ---- what kernels call -------------------------------------------------------------------------
extern "C" {
void msl_reduce(void* value, int type, int operation, int line) {
  static const int sizes[] = {4, 2, 2, 4, 4, 2, 2, 1, 1};
  memcpy(self->current->value, value, sizes[type]);
  meet(REDUCE + type * 16 + operation, line);
  memcpy(value, self->current->value, sizes[type]);
}

void msl_shuffle(void* value, int bytes, int source, int kind, int line) {
  if (bytes > 16) {
    report(nullptr, "%s of %d bytes on line %d", name_of(kind), bytes, line);
    stop();
  }
  memcpy(self->current->value, value, bytes);
  self->current->source = source;
  meet(kind, line);
  memcpy(value, self->current->value, bytes);
}

uint64_t msl_ballot(int vote, int line) {
  self->current->value[0] = vote != 0;
  meet(BALLOT, line);
  return self->current->value[0];
}

void msl_multiply(float* d, const float* a, const float* b, const float* c, int line) {
  float* m = self->current->matrices;
  memcpy(m, a, 8);
  memcpy(m + 2, b, 8);
  memcpy(m + 4, c, 8);
  meet(MULTIPLY, line);
  memcpy(d, self->current->matrices + 4, 8);
}

void msl_together(int kind, int line) {
  if (self->launch->check) {
    meet(kind, line);
  }
}

void msl_simd_barrier(int flags, int line) {
  meet(BARRIER + (flags & 3), line);
}

unsigned msl_lane(void) {
  return self->current->ids.lane;
}

// Strict: waits for all threads, also for those that have returned.
void msl_barrier(int flags, int line) {
  Worker* w = self;
  Fibre* fibre = w->current;
  if (w->at_barrier == 0) {
    w->barrier_line = line;
  } else if (w->barrier_line != line) {
    report(nullptr,
           "divergent barrier: threads of one threadgroup are at the barriers of lines %d and %d",
           w->barrier_line, line);
    stop();
  }
  fibre->state = AT_BARRIER;
  fibre->line = line;
  if (++w->at_barrier < w->size) {
    wait();
    return;
  }
  w->at_barrier = 0;
  w->device_epoch += flags & 1;
  w->group_epoch += flags >> 1 & 1;
  for (u32 i = 0; i < w->size; i++) {
    w->fibres[i].state = RUNNING;
  }
}

void* msl_threadgroup(int id, size_t bytes, size_t align, int element, const char* name, int line) {
  Worker* w = self;
  for (int i = 0; i < w->num_arrays; i++) {
    if (w->arrays[i].id == id) {
      return w->arrays[i].low;
    }
  }
  w->memory_used = (w->memory_used + align - 1) / align * align + bytes;
  if (w->memory_used > w->statistics.group_memory) {
    w->statistics.group_memory = w->memory_used;
  }
  const u64 room = w->launch->check ? RED_ZONE : 0;
  const u64 low = (w->memory_end + room + 15) / 16 * 16;
  if (w->memory_used > w->launch->group_memory || w->num_arrays == MAX_ARRAYS ||
      low + bytes + room > GROUP_MEMORY) {
    report(nullptr, "threadgroup memory of %lu bytes is over the limit of %lu (at '%s', line %d)",
           (unsigned long)w->memory_used, (unsigned long)w->launch->group_memory, name, line);
    stop();
  }
  w->memory_end = low + bytes + room;
  w->cells_end = w->launch->check ? w->memory_end : 0;
  const u32 granule = element % 2 ? 1 : element % 4 ? 2 : 4;
  w->arrays[w->num_arrays++] = {w->memory + low, bytes, granule, id, name};
  return w->memory + low;
}

void msl_atomic(const volatile void* address, int bytes, int kind, int line) {
  (void)line;
  if (self->launch->check && !on_stack(const_cast<const void*>(address))) {
    check(static_cast<const char*>(const_cast<const void*>(address)), bytes, Access(kind), true,
          __builtin_return_address(0));
  }
}

// Callbacks of the instrumentation.
#define CALLBACKS(bytes)                                                                           \
  void __asan_load##bytes(const void* p) {                                                         \
    if (!on_stack(p)) check((const char*)p, bytes, READ, false, __builtin_return_address(0));      \
  }                                                                                                \
  void __asan_store##bytes(const void* p) {                                                        \
    if (!on_stack(p)) check((const char*)p, bytes, WRITE, false, __builtin_return_address(0));     \
  }                                                                                                \
  void __asan_report_load##bytes(const void*) {                                                    \
    abort();                                                                                       \
  }                                                                                                \
  void __asan_report_store##bytes(const void*) {                                                   \
    abort();                                                                                       \
  }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
void __asan_loadN(const void* p, size_t n) {
  if (!on_stack(p)) check((const char*)p, n, READ, false, __builtin_return_address(0));
}
void __asan_storeN(const void* p, size_t n) {
  if (!on_stack(p)) check((const char*)p, n, WRITE, false, __builtin_return_address(0));
}
void* __asan_memcpy(void* to, const void* from, size_t n) {
  if (n && !on_stack(from)) check((const char*)from, n, READ, false, __builtin_return_address(0));
  if (n && !on_stack(to)) check((const char*)to, n, WRITE, false, __builtin_return_address(0));
  return memmove(to, from, n);
}
void* __asan_memmove(void* to, const void* from, size_t n) {
  if (n && !on_stack(from)) check((const char*)from, n, READ, false, __builtin_return_address(0));
  if (n && !on_stack(to)) check((const char*)to, n, WRITE, false, __builtin_return_address(0));
  return memmove(to, from, n);
}
void* __asan_memset(void* to, int value, size_t n) {
  if (n && !on_stack(to)) check((const char*)to, n, WRITE, false, __builtin_return_address(0));
  return memset(to, value, n);
}
// The rest of what instrumented code refers to.
void __asan_init(void) {}
void __asan_version_mismatch_check_v8(void) {}
void __asan_report_load_n(const void*, size_t) {
  abort();
}
void __asan_report_store_n(const void*, size_t) {
  abort();
}
void __asan_handle_no_return(void) {}

struct SourceLocation {
  const char* file;
  u32 line, column;
};
struct TypeDescriptor {
  uint16_t kind, information;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};
struct Overflow {
  SourceLocation location;
  const TypeDescriptor* type;
};
void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uint64_t pointer) {
  report(nullptr,
         "misaligned access: %s needs an address that is a multiple of %u, and has one of %lu "
         "modulo 64, at %s:%u",
         data->type->name, 1u << data->log_alignment, (unsigned long)(pointer % 64),
         data->location.file, data->location.line);
  stop();
}
void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uint64_t index) {
  report(nullptr, "index %ld out of bounds of %s at %s:%u", (long)index, data->array->name,
         data->location.file, data->location.line);
  stop();
}
void __ubsan_handle_divrem_overflow_abort(Overflow* data, uint64_t, uint64_t) {
  report(nullptr, "division by zero or overflow in %s at %s:%u", data->type->name,
         data->location.file, data->location.line);
  stop();
}
#define OVERFLOW(what, word)                                                                       \
  void __ubsan_handle_##what##_overflow_abort(Overflow* data, uint64_t, uint64_t) {                \
    report(nullptr, "overflow of %s in a %s at %s:%u", data->type->name, word,                     \
           data->location.file, data->location.line);                                              \
    stop();                                                                                        \
  }
OVERFLOW(add, "sum")
OVERFLOW(sub, "difference")
OVERFLOW(mul, "product")
OVERFLOW(negate, "negation")

// ---- what Python calls -------------------------------------------------------------------------
// Room for the buffer of a slot, at the end of a page with no access after it (up to 15 bytes), or
// nullptr if there are no more slots.
void* msl_reserve(int slot, uint64_t bytes) {
  if (!arena) {
    arena = static_cast<char*>(map(SLOT * SLOTS, PROT_NONE));
  }
  if (slot >= SLOTS || bytes > SLOT / 2 - PAGE) {
    return nullptr;
  }
  char* low = arena + slot * SLOT + SLOT / 4;
  const u64 pages = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
  if (mprotect(low, pages, PROT_READ | PROT_WRITE)) {
    return nullptr;
  }
  return low + (pages - bytes) / 16 * 16;
}

void msl_release(int slot, uint64_t bytes) {
  char* low = arena + slot * SLOT + SLOT / 4;
  const u64 pages = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
  madvise(low, pages, MADV_DONTNEED);
  mprotect(low, pages, PROT_NONE);
}

// Not reentrant. Returns the number of errors and their text.
int msl_launch(Launch* l, char* text, int length, Statistics* statistics) {
  errors = 0;
  message[0] = 0;
  next_worker = 0;
  memset(&total_statistics, 0, sizeof total_statistics);
  Task task = {l, 0, 1};
  for (int i = 0; i < 3; i++) {
    task.total *= (l->grid[i] + l->group[i] - 1) / l->group[i];
  }
  if (l->check) {
    for (int i = 0; i < l->num_buffers; i++) {
      Buffer& b = l->buffers[i];
      if (b.granule && b.bytes) {
        b.cells = static_cast<Cell*>(
            map(sizeof(Cell) * ((b.bytes + b.granule - 1) / b.granule), PROT_READ | PROT_WRITE));
      }
    }
  }
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_action);
  int count = l->check || u64(l->workers) > task.total ? 1 : l->workers;
  count = count < 1 ? 1 : count > 16 ? 16 : count;
  pthread_t threads[16];
  for (int i = 1; i < count; i++) {
    pthread_create(&threads[i], nullptr, work, &task);
  }
  work(&task);
  for (int i = 1; i < count; i++) {
    pthread_join(threads[i], nullptr);
  }
  sigaction(SIGSEGV, &previous_action, nullptr);
  for (int i = 0; i < l->num_buffers; i++) {
    Buffer& b = l->buffers[i];
    if (b.cells) {
      munmap(b.cells, sizeof(Cell) * ((b.bytes + b.granule - 1) / b.granule));
      b.cells = nullptr;
    }
  }
  strncpy(text, message, length - 1);
  *statistics = total_statistics;
  return errors;
}
}
