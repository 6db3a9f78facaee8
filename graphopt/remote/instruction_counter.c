// A plugin of QEMU's that counts the instructions a program executes between two marks.
//
// A mark is the system call getpriority(MARK, what, address), which the kernel refuses and the program ignores:
//   what 1: count from here on, in the thread that marks
//   what 0: stop, and write what was counted
//   what 2: the library whose functions are listed in `functions` was loaded at `address`
//
// Arguments: output=FILE, and functions=FILE with one line for each part of a function: offset, size (both in hexadecimal),
// number of the function, 1 where the part is its entry. Parts are in ascending order. What is written, a block for each
// pair of marks:
//   total INSTRUCTIONS
//   call FUNCTION INSTRUCTIONS      for each call of a function, in order: what its own code executed
//   block OFFSET INSTRUCTIONS TIMES  for each run of instructions of a function: where, how long, how often executed
//
// QEMU's plugin API is declared here as far as it is used, since Debian packages no header of it:
// https://www.qemu.org/docs/master/devel/tcg-plugins.html. What is used is the same in all versions since 1 (QEMU 6.0);
// -DPLUGIN_VERSION says which one to claim: QEMU 9.0 and later refuse 1, those before it refuse more.

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define MARK 0x67726f70
#define GETPRIORITY 141  // of every architecture with the generic table: aarch64, riscv

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_info;
enum { NO_REGISTERS = 0 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, void (*executed)(unsigned int, void *), int flags,
                                          void *data);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id,
                                          void (*called)(qemu_plugin_id_t, unsigned int, int64_t, uint64_t, uint64_t,
                                                         uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

PUBLIC int qemu_plugin_version = PLUGIN_VERSION;

typedef struct {
  uint64_t offset, size;
  int number, entry;
} Part;

// A run of instructions that are executed together.
typedef struct {
  uint64_t address, instructions, times;
  int function;  // -1: none that is listed
  int entry;
} Block;

typedef struct {
  int function;
  uint64_t instructions;
} Call;

static FILE *output;
static Part *parts;
static size_t part_count;
static uint64_t base;
static unsigned int counted = ~0u;  // the thread
static uint64_t total;
static Call *calls;
static size_t call_count, call_room;
static Block **blocks;  // those of functions
static size_t block_count, block_room;

static void *grown(void *memory, size_t bytes) {
  void *found = realloc(memory, bytes);
  if (found == NULL) {
    fprintf(stderr, "the instruction counter is out of memory\n");
    exit(1);
  }
  return found;
}

static const Part *part_of(uint64_t address) {
  if (base == 0 || address < base) return NULL;
  uint64_t offset = address - base;
  size_t low = 0, high = part_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (parts[middle].offset + parts[middle].size <= offset) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < part_count && parts[low].offset <= offset ? &parts[low] : NULL;
}

static void executed(unsigned int thread, void *data) {
  if (thread != counted) return;
  Block *block = data;
  total += block->instructions;
  if (block->function < 0) return;
  ++block->times;
  if (block->entry || call_count == 0 || calls[call_count - 1].function != block->function) {
    if (call_count == call_room) {
      call_room = call_room ? 2 * call_room : 1024;
      calls = grown(calls, call_room * sizeof *calls);
    }
    calls[call_count++] = (Call){block->function, 0};
  }
  calls[call_count - 1].instructions += block->instructions;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  Block *block = grown(NULL, sizeof *block);  // QEMU may run the code it makes now for as long as it lives
  uint64_t address = qemu_plugin_tb_vaddr(tb);
  const Part *part = part_of(address);
  block->address = address;
  block->instructions = qemu_plugin_tb_n_insns(tb);
  block->times = 0;
  block->function = part ? part->number : -1;
  block->entry = part && part->entry && base + part->offset == address;
  if (part != NULL) {
    if (block_count == block_room) {
      block_room = block_room ? 2 * block_room : 1024;
      blocks = grown(blocks, block_room * sizeof *blocks);
    }
    blocks[block_count++] = block;
  }
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, block);
}

static void marked(qemu_plugin_id_t id, unsigned int thread, int64_t number, uint64_t mark, uint64_t what,
                   uint64_t address, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != GETPRIORITY || mark != MARK) return;
  if (what == 2) {
    base = address;
  } else if (what == 1) {
    total = 0;
    call_count = 0;
    for (size_t i = 0; i < block_count; ++i) blocks[i]->times = 0;
    counted = thread;
  } else if (what == 0 && counted == thread) {
    counted = ~0u;
    fprintf(output, "total %" PRIu64 "\n", total);
    for (size_t i = 0; i < call_count; ++i) {
      fprintf(output, "call %d %" PRIu64 "\n", calls[i].function, calls[i].instructions);
    }
    for (size_t i = 0; i < block_count; ++i) {
      if (blocks[i]->times == 0) continue;
      fprintf(output, "block %" PRIx64 " %" PRIu64 " %" PRIu64 "\n", blocks[i]->address - base, blocks[i]->instructions,
              blocks[i]->times);
    }
    fflush(output);
  }
}

static bool read_functions(const char *path) {
  FILE *file = fopen(path, "r");
  if (file == NULL) return false;
  Part part;
  while (fscanf(file, "%" SCNx64 " %" SCNx64 " %d %d", &part.offset, &part.size, &part.number, &part.entry) == 4) {
    parts = grown(parts, (part_count + 1) * sizeof *parts);
    parts[part_count++] = part;
  }
  fclose(file);
  return true;
}

PUBLIC int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_plugin_info *info, int count, char **arguments) {
  (void)info;
  for (int i = 0; i < count; ++i) {
    const char *value = strchr(arguments[i], '=');
    if (value == NULL) return 1;
    if (strncmp(arguments[i], "output=", 7) == 0) {
      output = fopen(value + 1, "w");
    } else if (strncmp(arguments[i], "functions=", 10) != 0 || !read_functions(value + 1)) {
      fprintf(stderr, "the instruction counter cannot read %s\n", arguments[i]);
      return 1;
    }
  }
  if (output == NULL) {
    fprintf(stderr, "the instruction counter has no file to write\n");
    return 1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, marked);
  return 0;
}
