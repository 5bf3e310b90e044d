/* Principal entries on the host, by the index as it is stored (lift_ds/index/encoding.py): row counts and 16-bit
 * columns of blocks, or int32 positions of blocks. No positions are made; of the matrix only the lines with an entry
 * are touched.
 *
 * Safe against a corrupt index: the sum of the row counts is compared with the number of blocks before anything is
 * copied, and every column with the part of its row that lies in the piece; an entry outside is left alone.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
/* Into the second level of the cache: what a row ahead touches would push what is in use out of the first. Measured: a
 * quarter less time than with prefetches into the first level, or with none. */
#define PREFETCH(address, write) __builtin_prefetch((address), (write), 2)
#else
#define INLINE static inline
#define PREFETCH(address, write)
#endif

/* Entries that are worth a thread: below, starting it costs more than it saves. */
enum { WORTH_A_THREAD = 16384 };

/* One copy between a piece of a matrix [m, n] and its k values. */
typedef struct {
    const void *words;     /* of the index */
    int64_t blocks;        /* k / (p * q) */
    int64_t grid_rows;     /* m / p */
    int64_t grid_columns;  /* n / q */
    int64_t p, q;          /* rows and columns of a block */
    int wide;              /* whether the words are positions of blocks */
    char *piece;           /* flat positions [start, stop) */
    int64_t start, stop;
    char *values;          /* [k] */
} Copy;

/* The entries of one row of the matrix. */
typedef struct {
    const void *columns; /* of its blocks: uint16_t, or int32_t positions if the index is wide */
    int64_t count;       /* of its blocks */
    int64_t left;        /* how many more columns may be read after those, to know what comes next */
    int64_t origin;      /* of wide positions: that of the first block of this row of blocks */
    int64_t first;       /* of its entries among all k */
    int64_t place;       /* of column 0 in the piece; may be outside of it */
    int64_t low, high;   /* columns of the matrix that lie in the piece */
    int64_t next;        /* distance of the row of the matrix that is copied next */
} Row;

typedef void (*CopyRow)(const Copy *, const Row *);

INLINE uint16_t same16(uint16_t x) { return x; }
INLINE uint32_t same32(uint32_t x) { return x; }
INLINE uint64_t same64(uint64_t x) { return x; }
INLINE uint32_t widen(uint16_t x) { return (uint32_t)x << 16; }

/* float32 to bfloat16: to nearest, ties to even; every NaN becomes the one that torch's vectorised conversion writes. */
INLINE uint16_t narrow(uint32_t x)
{
    uint32_t rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
    return (x & 0x7FFFFFFFu) > 0x7F800000u ? 0xFFFFu : (uint16_t)rounded;
}

INLINE int64_t column_of(const Row *row, int64_t block, int wide)
{
    return wide ? ((const int32_t *)row->columns)[block] - row->origin : ((const uint16_t *)row->columns)[block];
}

/* The loops over a row, for each pair of types and both directions; `q` and `wide` are constants where they are called.
 * What the next row will touch is asked for a row ahead: its columns stand right after those of this one. */
#define DEFINE_COPY(NAME, PIECE, VALUE, WRITES, ASSIGN)                                                                \
    INLINE void NAME##_row(const Copy *copy, const Row *row, int64_t q, int wide)                                      \
    {                                                                                                                  \
        PIECE *piece = (PIECE *)copy->piece + row->place;                                                              \
        VALUE *values = (VALUE *)copy->values + row->first;                                                            \
        uint64_t length = (uint64_t)(row->high - row->low);                                                            \
        int64_t known = row->left < row->count ? row->left : row->count;                                               \
        for (int64_t block = 0; block < row->count; ++block) {                                                         \
            int64_t column = column_of(row, block, wide) * q;                                                          \
            if (block < known)                                                                                         \
                PREFETCH(piece + row->next + q * column_of(row, block + row->count, wide), WRITES);                    \
            for (int64_t e = 0; e < q; ++e)                                                                            \
                if ((uint64_t)(column + e - row->low) < length) {                                                      \
                    PIECE *held = piece + column + e;                                                                  \
                    VALUE *value = values + block * q + e;                                                             \
                    ASSIGN;                                                                                            \
                }                                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    static void NAME(const Copy *copy, const Row *row)                                                                 \
    {                                                                                                                  \
        if (copy->wide)                                                                                                \
            NAME##_row(copy, row, copy->q, 1);                                                                         \
        else if (copy->q == 1)                                                                                         \
            NAME##_row(copy, row, 1, 0);                                                                               \
        else                                                                                                           \
            NAME##_row(copy, row, copy->q, 0);                                                                         \
    }
#define DEFINE_BOTH(NAME, PIECE, VALUE, TO_VALUE, TO_PIECE)                                                            \
    DEFINE_COPY(gather_##NAME, PIECE, VALUE, 0, *value = TO_VALUE(*held))                                              \
    DEFINE_COPY(put_##NAME, PIECE, VALUE, 1, *held = TO_PIECE(*value))

DEFINE_BOTH(same2, uint16_t, uint16_t, same16, same16)
DEFINE_BOTH(same4, uint32_t, uint32_t, same32, same32)
DEFINE_BOTH(same8, uint64_t, uint64_t, same64, same64)
DEFINE_BOTH(bf16_f32, uint16_t, uint32_t, widen, narrow)
DEFINE_BOTH(f32_bf16, uint32_t, uint16_t, narrow, widen)

/* By the numbers that host_access.py gives to pairs of types. */
static const struct {
    CopyRow gather, put;
} KINDS[] = {
    {gather_same2, put_same2},       {gather_same4, put_same4},       {gather_same8, put_same8},
    {gather_bf16_f32, put_bf16_f32}, {gather_f32_bf16, put_f32_bf16},
};

/* How many blocks of a wide index stand before a row of blocks. */
static int64_t wide_before(const Copy *copy, int64_t grid_row)
{
    const int32_t *positions = copy->words;
    int64_t low = 0, high = copy->blocks, wanted = grid_row * copy->grid_columns;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (positions[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The sum of the counts of some rows of blocks, in a narrow index. */
static int64_t sum_counts(const Copy *copy, int64_t first, int64_t last)
{
    const uint16_t *counts = copy->words;
    int64_t sum = 0;
    for (int64_t row = first; row < last; ++row)
        sum += counts[row];
    return sum;
}

/* How many blocks stand in a row of blocks; `before` stand before it. Never more than there are. */
static int64_t count_blocks(const Copy *copy, int64_t grid_row, int64_t before)
{
    if (!copy->wide)
        return ((const uint16_t *)copy->words)[grid_row];
    int64_t count = wide_before(copy, grid_row + 1) - before;
    return count > 0 ? count : 0;
}

/* Copy the p rows of a row of blocks. */
static void copy_grid_row(const Copy *copy, CopyRow copy_row, int64_t grid_row, int64_t before, int64_t count)
{
    int64_t n = copy->grid_columns * copy->q;
    Row row = {
        .count = count, .left = copy->p == 1 ? copy->blocks - before - count : 0,
        .origin = grid_row * copy->grid_columns,
        .next = copy->wide ? 0 : n, /* positions of a wide index count on over the rows */
    };
    row.columns = copy->wide ? (const void *)((const int32_t *)copy->words + before)
                             : (const void *)((const uint16_t *)copy->words + copy->grid_rows + before);
    for (int64_t i = 0; i < copy->p; ++i) {
        int64_t from = (grid_row * copy->p + i) * n;
        row.place = from - copy->start;
        row.low = copy->start > from ? copy->start - from : 0;
        row.high = copy->stop < from + n ? copy->stop - from : n;
        row.first = before * copy->p * copy->q + i * count * copy->q;
        if (row.low < row.high)
            copy_row(copy, &row);
    }
}

/* Copy the rows of blocks from `first` to `last` whose first block is one of [from, to). */
static void copy_share(const Copy *copy, CopyRow copy_row, int64_t first, int64_t last, int64_t before, int64_t from,
                       int64_t to)
{
    for (int64_t row = first; row < last && before < to; ++row) {
        int64_t count = count_blocks(copy, row, before);
        if (before >= from)
            copy_grid_row(copy, copy_row, row, before, count);
        before += count;
    }
}

/* Copy the rows of blocks from `first` to `last`, which have `inside` blocks, on as many threads as these are worth. */
static void copy_rows(const Copy *copy, CopyRow copy_row, int64_t first, int64_t last, int64_t before, int64_t inside,
                      int64_t threads)
{
    int64_t worth = inside * copy->p * copy->q / WORTH_A_THREAD;
    if (threads > worth)
        threads = worth;
#ifdef _OPENMP
    /* No parallel region on one thread: in a forked process it could wait for threads that only the parent has. */
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        {
            int64_t share = omp_get_thread_num(), shares = omp_get_num_threads();
            copy_share(copy, copy_row, first, last, before, before + inside * share / shares,
                       before + inside * (share + 1) / shares);
        }
        return;
    }
#endif
    copy_share(copy, copy_row, first, last, before, before, before + inside);
}

/* Copy what lies in the piece; returns what is wrong with the index, or NULL. */
static const char *copy_piece(const Copy *copy, CopyRow copy_row, int64_t threads)
{
    int64_t row_entries = copy->p * copy->grid_columns * copy->q;
    int64_t first = copy->start / row_entries, last = (copy->stop + row_entries - 1) / row_entries;
    int64_t before, through;
    if (copy->wide) {
        before = wide_before(copy, first);
        through = wide_before(copy, last);
    } else {
        before = sum_counts(copy, 0, first);
        through = before + sum_counts(copy, first, last);
        if (through + sum_counts(copy, last, copy->grid_rows) != copy->blocks)
            return "the row counts of the index do not add up to its blocks";
    }
    if (through > before)
        copy_rows(copy, copy_row, first, last, before, through - before, threads);
    return NULL;
}

/* What is wrong with the sizes of a copy, or NULL. */
static const char *wrong_sizes(const Copy *copy, int64_t words, int64_t values)
{
    if (copy->p < 1 || copy->q < 1 || copy->grid_rows < 1 || copy->grid_columns < 1 || copy->blocks < 0)
        return "a matrix or its blocks have no rows or columns";
    if (words != (copy->wide ? copy->blocks : (copy->grid_rows + copy->blocks + 1) / 2))
        return "the index has another number of words than its layout says";
    if (values != copy->blocks * copy->p * copy->q)
        return "there are not as many values as entries";
    if (copy->start < 0 || copy->stop < copy->start ||
        copy->stop > copy->grid_rows * copy->p * copy->grid_columns * copy->q)
        return "the piece is not a range of the matrix";
    return NULL;
}

enum {
    KIND, GATHER, WORDS, WORD_COUNT, BLOCKS, GRID_ROWS, GRID_COLUMNS, P, Q, WIDE, PIECE, START, STOP, VALUES,
    VALUE_COUNT, THREADS, ARGUMENTS
};

PyDoc_STRVAR(copy_entries_doc,
             "copy_entries(kind, gather, words, word_count, blocks, grid_rows, grid_columns, p, q, wide, piece, start,\n"
             "             stop, values, value_count, threads)\n--\n\n"
             "Copy the entries of the flat positions [start, stop) from `piece` to `values`, or back; words, piece and\n"
             "values are addresses, all arguments int. Raises ValueError, before anything is copied, when sizes\n"
             "contradict each other.");

static PyObject *copy_entries(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    long long a[ARGUMENTS];
    (void)module;
    if (count != ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "copy_entries takes %d arguments", (int)ARGUMENTS);
    for (int i = 0; i < ARGUMENTS; ++i) {
        a[i] = PyLong_AsLongLong(arguments[i]);
        if (a[i] == -1 && PyErr_Occurred())
            return NULL;
    }
    if (a[KIND] < 0 || a[KIND] >= (long long)(sizeof KINDS / sizeof KINDS[0]))
        return PyErr_Format(PyExc_ValueError, "there is no kind %lld of a copy", a[KIND]);
    Copy copy = {
        .words = (const void *)(intptr_t)a[WORDS], .blocks = a[BLOCKS], .grid_rows = a[GRID_ROWS],
        .grid_columns = a[GRID_COLUMNS], .p = a[P], .q = a[Q], .wide = a[WIDE] != 0,
        .piece = (char *)(intptr_t)a[PIECE], .start = a[START], .stop = a[STOP],
        .values = (char *)(intptr_t)a[VALUES],
    };
    const char *wrong = wrong_sizes(&copy, a[WORD_COUNT], a[VALUE_COUNT]);
    if (wrong == NULL) {
        Py_BEGIN_ALLOW_THREADS
        wrong = copy_piece(&copy, a[GATHER] ? KINDS[a[KIND]].gather : KINDS[a[KIND]].put, a[THREADS]);
        Py_END_ALLOW_THREADS
    }
    if (wrong != NULL) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"copy_entries", (PyCFunction)(void (*)(void))copy_entries, METH_FASTCALL, copy_entries_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_host", "Principal entries on the host.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__host(void) { return PyModule_Create(&MODULE); }
