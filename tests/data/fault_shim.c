/* Counts what a process changes below a folder, and lets the n-th change fail; preloaded before libc.

   FAULT_UNDER  the folder; without it nothing is counted
   FAULT_AT     number of the change that fails, from 1; 0: none
   FAULT_HOW    error: it alone fails with EIO; full: it and all later ones fail with ENOSPC, as on a full disk;
                crash: half of what is to be written is, then the process ends at once
   FAULT_LOG    file that gets a line for every change: number, name, path  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CRASHED 99

static int changes; /* children count on from their parent's, which counts none */

enum { GO_ON, FAIL, CRASH };

static int below(const char *path) {
  const char *folder = getenv("FAULT_UNDER");
  size_t length = folder ? strlen(folder) : 0;
  return length && strncmp(path, folder, length) == 0 && (!path[length] || path[length] == '/');
}

static int judged(const char *name, const char *path) {
  if (!below(path)) return GO_ON;
  int number = __atomic_add_fetch(&changes, 1, __ATOMIC_SEQ_CST);
  const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_AT"), *how = getenv("FAULT_HOW");
  if (log) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%d %s %s\n", number, name, path);
    int file = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (file >= 0) {
      if (REAL(write)(file, line, length) < 0) abort();
      close(file);
    }
  }
  int failing = at ? atoi(at) : 0;
  if (!failing || !how || number < failing) return GO_ON;
  /* What makes room works on a full disk. */
  int frees = !strcmp(name, "unlink") || !strcmp(name, "rmdir");
  if (!strcmp(how, "full")) {
    if (frees && number > failing) return GO_ON;
    errno = ENOSPC;
    return FAIL;
  }
  if (number > failing) return GO_ON;
  errno = EIO;
  return strcmp(how, "crash") ? FAIL : CRASH;
}

static int of_file(const char *name, int file) {
  char link[64], path[PATH_MAX];
  if (!getenv("FAULT_UNDER")) return GO_ON;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return GO_ON;
  path[length] = 0;
  return judged(name, path);
}

static int of_path(const char *name, int folder, const char *path) {
  char link[64], whole[2 * PATH_MAX];
  if (!getenv("FAULT_UNDER")) return GO_ON;
  if (path[0] == '/') return judged(name, path);
  if (folder == AT_FDCWD)
    snprintf(link, sizeof link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t length = readlink(link, whole, PATH_MAX);
  if (length < 0) return GO_ON;
  snprintf(whole + length, sizeof whole - length, "/%s", path);
  return judged(name, whole);
}

#define STOP(verdict)               \
  do {                              \
    int found = (verdict);          \
    if (found == CRASH) _exit(CRASHED); \
    if (found == FAIL) return -1;   \
  } while (0)

ssize_t write(int file, const void *from, size_t count) {
  int found = of_file("write", file);
  if (found == CRASH) {
    if (REAL(write)(file, from, count / 2) >= 0) _exit(CRASHED);
    _exit(CRASHED);
  }
  return found == FAIL ? -1 : REAL(write)(file, from, count);
}

ssize_t writev(int file, const struct iovec *from, int count) {
  STOP(of_file("writev", file));
  return REAL(writev)(file, from, count);
}

ssize_t pwrite64(int file, const void *from, size_t count, off64_t at) {
  STOP(of_file("pwrite", file));
  return REAL(pwrite64)(file, from, count, at);
}

int fsync(int file) {
  STOP(of_file("fsync", file));
  return REAL(fsync)(file);
}

int ftruncate64(int file, off64_t length) {
  STOP(of_file("ftruncate", file));
  return REAL(ftruncate64)(file, length);
}

int ftruncate(int file, off_t length) {
  STOP(of_file("ftruncate", file));
  return REAL(ftruncate)(file, length);
}

int rename(const char *from, const char *to) {
  STOP(of_path("rename", AT_FDCWD, to));
  return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
  STOP(of_path("mkdir", AT_FDCWD, path));
  return REAL(mkdir)(path, mode);
}

int unlink(const char *path) {
  STOP(of_path("unlink", AT_FDCWD, path));
  return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
  STOP(of_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path));
  return REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
  STOP(of_path("rmdir", AT_FDCWD, path));
  return REAL(rmdir)(path);
}

/* Opening counts where it makes or empties a file. */
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE(mode, flags)       \
  mode_t mode = 0;              \
  if ((flags) & O_CREAT) {      \
    va_list rest;               \
    va_start(rest, flags);      \
    mode = va_arg(rest, mode_t); \
    va_end(rest);               \
  }

int open(const char *path, int flags, ...) {
  MODE(mode, flags)
  if (CHANGES(flags)) STOP(of_path("open", AT_FDCWD, path));
  return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  MODE(mode, flags)
  if (CHANGES(flags)) STOP(of_path("open", AT_FDCWD, path));
  return REAL(open64)(path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
  MODE(mode, flags)
  if (CHANGES(flags)) STOP(of_path("open", folder, path));
  return REAL(openat)(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
  MODE(mode, flags)
  if (CHANGES(flags)) STOP(of_path("open", folder, path));
  return REAL(openat64)(folder, path, flags, mode);
}
