# distutils: language = c++
# cython: language_level=3, boundscheck=False, initializedcheck=False
"""Factoring: from quantized weights to a `SumProgram` of few operations.

A *term* is a signed value in one integer: 2 * value, plus 1 if it is subtracted. NONE is the empty sum.
"""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libcpp.unordered_map cimport unordered_map
from libcpp.utility cimport move, pair as cpp_pair
from libcpp.vector cimport vector

from pycodesign.quantize import QuantizedTensor

from . import program as form
from .summerge import merge_sums

__all__ = ["factor"]

cdef extern from "repetition/pairs.h" namespace "pycodesign::repetition":
    cdef cppclass Pair:
        int32_t u, v
        bint differ

    cdef cppclass PairElimination:
        PairElimination()
        PairElimination(const vector[vector[int32_t]]&, int32_t inputs, uint64_t seed) except +
        bint run(size_t limit) except +
        const vector[vector[int32_t]]& rows()
        const vector[Pair]& pairs()
        size_t additions()

cdef enum:
    NONE = -2
    STEPS = 256         # eliminations between two looks for Ctrl-C

cdef uint8_t ADD = form.ADD, SUBTRACT = form.SUBTRACT, MULTIPLY = form.MULTIPLY
cdef int32_t ZERO = form.ZERO

MAX_LEVELS = 16
MAX_PATTERN = 8         # inputs; longer patterns hardly ever recur
MAX_INTEGER = 1 << 24   # float32 holds every integer up to here
MAX_MERGED = 1 << 14    # weights for summerge, which compares all pairs of groups
MAX_PAIRED = 1 << 36    # outputs * inputs^2 of a group for pair: 4,096 of each
MAX_PAIRS = 1 << 27     # inputs^2: pairs that may wait in the queue, 12 bytes each
MAX_GROUPS = 1 << 12    # of inputs of one level of one output, for summerge
MAX_TRIES = 64          # of careful pair elimination
TRIED_WORK = 1 << 21    # outputs * inputs^2 of all tries together, about
CAREFUL_WORK = 1 << 25  # outputs * inputs^2 up to which it is done: a second or two


def factor(q, method="pair", *, groups=1, **options):
    """Compile quantized weights into a program that computes each recurring partial sum once.

    Parameters
    ----------
    q : QuantizedTensor
        Weights of a convolution, (O, I / groups, kH, kW), or of a linear layer, (O, I), with at most 16 levels per
        output. The scale is not part of the program.
    method : {"pair", "saturate", "summerge", "patterns", "unique"}
        ``"pair"`` shares any sums between outputs: the fewest operations, up to 4,096 outputs and inputs a group, in
        seconds for most layers. ``"saturate"`` goes on from there by equality saturation, up to 4,096 weights.
        ``"summerge"`` shares sums of inputs of equal weight, up to 16,384 weights a group; ``"patterns"`` sums of a few
        neighboring inputs; ``"unique"`` shares nothing between outputs (UCNN).
    groups : int
        Groups of the convolution; each gets a program of its own.
    **options
        Of ``"saturate"``: those of `saturate.saturate`, which also tells more.

    Returns
    -------
    SumProgram
        Over (I / groups) * kH * kW input rows per group, in C order.

    Raises
    ------
    TypeError
        If q is no QuantizedTensor, groups no integer, or the method takes no such option.
    ValueError
        If the method is unknown, q has more than 16 levels or is too large for the method, or groups do not divide the
        outputs.
    ModuleNotFoundError
        If ``"saturate"`` lacks egglog or highspy.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import quantize
    >>> from pycodesign.repetition import factor
    >>> q = quantize.ternary(np.random.default_rng(0).standard_normal((64, 64), np.float32))
    >>> program = factor(q)
    >>> program.dense_ops
    8128
    >>> program.removed > 0.8
    True
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method == "saturate":
        from .saturate import saturate

        return saturate(q, groups=groups, **options).program
    if options:
        raise TypeError(f"{next(iter(options))}: expected no options for method {method!r}")
    return METHODS[method](*prepare(q, groups), groups)


def prepare(q, groups):
    """Check the arguments of `factor`; return codes (O, I) and levels (O, Q), int64 where all are integers."""
    if not isinstance(q, QuantizedTensor):
        hint = "; its to_quantized() is one" if hasattr(q, "to_quantized") else ""
        raise TypeError(f"q: expected a QuantizedTensor, got {type(q).__name__}{hint}")
    if q.levels.shape[-1] > MAX_LEVELS:
        raise ValueError(f"q: expected at most {MAX_LEVELS} levels, got {q.levels.shape[-1]}")
    if not isinstance(groups, (int, np.integer)):
        raise TypeError(f"groups: expected an integer, got {groups!r}")
    outputs = q.shape[0]
    if groups < 1 or outputs % groups:
        raise ValueError(f"groups: expected a divisor of {outputs} outputs, got {groups}")
    codes = np.ascontiguousarray(q.codes.reshape(outputs, -1), np.uint8)
    levels = np.asarray(q.levels, np.float64)
    if (levels == np.rint(levels)).all() and (np.abs(levels) <= MAX_INTEGER).all():
        levels = levels.astype(np.int64)
    return codes, np.broadcast_to(levels, (outputs, levels.shape[-1]))


cdef class Builder:
    """The instructions of a program in the making; codes (O, I) and levels (O, Q) say what it is to compute."""

    cdef object codes, levels, groups
    cdef int32_t inputs
    cdef vector[uint8_t] op
    cdef vector[int32_t] left, right
    cdef unordered_map[uint64_t, int32_t] emitted
    cdef dict constants

    def __init__(self, codes, levels, groups):
        self.codes, self.levels, self.groups = codes, levels, groups
        self.inputs = groups * codes.shape[1]
        self.constants = {}

    cdef int32_t emit(self, uint8_t op, int32_t left, int32_t right, bint share):
        """The value of an instruction; with share, of the one emitted before if there is one."""
        cdef int32_t value = self.inputs + <int32_t>self.op.size()
        cdef cpp_pair[unordered_map[uint64_t, int32_t].iterator, bint] place
        cdef uint64_t key
        if share:
            key = (<uint64_t>op << 62) | (<uint64_t>(left + 1) << 31) | <uint64_t>(right + 1)
            place = self.emitted.insert(cpp_pair[uint64_t, int32_t](key, value))
            if not place.second:
                return self.emitted[key]
        if value >= 1 << 30:  # a term is twice its value, and a sign
            raise ValueError(f"q: expected a layer of fewer than 2^30 inputs and operations, got {value}")
        self.op.push_back(op)
        self.left.push_back(left)
        self.right.push_back(right)
        return value

    cdef int32_t add(self, int32_t a, int32_t b, bint share):
        """The term a + b."""
        if a == NONE or b == NONE:
            return b if a == NONE else a
        return 2 * self.emit(SUBTRACT if (a ^ b) & 1 else ADD, a >> 1, b >> 1, share) + (a & 1)

    cdef int32_t multiply(self, constant, int32_t a, bint share):
        """The term constant * a; 0 and +-1 take no instruction."""
        if a == NONE or constant == 0:
            return NONE
        if abs(constant) == 1:
            return a ^ (constant < 0)
        cdef int32_t index = self.constants.setdefault(constant, len(self.constants))
        return 2 * self.emit(MULTIPLY, a >> 1, index, share) + (a & 1)

    cdef int32_t sum(self, const vector[int32_t]& terms, bint share):
        """The sum of terms. It starts with the first that is not subtracted, so that it need not be negated."""
        cdef size_t first = 0, k
        cdef int32_t total
        if terms.empty():
            return NONE
        while first < terms.size() and terms[first] & 1:
            first += 1
        if first == terms.size():
            first = 0
        total = terms[first]
        for k in range(terms.size()):
            if k != first:
                total = self.add(total, terms[k], share)
        return total

    cdef int32_t value(self, int32_t term, bint share):
        """The value of a term."""
        if term == NONE:
            return ZERO
        return self.emit(SUBTRACT, ZERO, term >> 1, share) if term & 1 else term >> 1

    def finish(self, outputs, method):
        return form.SumProgram(
            op=np.array(self.op, np.uint8),
            left=np.array(self.left, np.int32),
            right=np.array(self.right, np.int32),
            constants=np.array(list(self.constants), self.levels.dtype),
            outputs=np.array(outputs, np.int32),
            codes=self.codes,
            levels=self.levels,
            groups=self.groups,
            method=method,
        )


def factor_unique(codes, levels, groups):
    """Factor each output by itself: sum the inputs of each level, multiply once per level, add.

    References
    ----------
    K. Hegde et al., UCNN: Exploiting Computational Reuse in Deep Neural Networks via Weight Repetition, ISCA 2018
    (its factorization of one filter; sharing between filters is what the other methods do better).
    """
    cdef Builder builder = Builder(codes, levels, groups)
    cdef vector[int32_t] members, terms
    cdef int32_t first, i
    per_group, inputs = len(codes) // groups, codes.shape[1]
    outputs = []
    for o in range(len(codes)):
        first = o // per_group * inputs
        weights = levels[o, codes[o]]
        terms.clear()
        for level in np.unique(weights[weights != 0]).tolist():
            members.clear()
            for i in np.flatnonzero(weights == level):
                members.push_back(2 * (first + i))
            terms.push_back(builder.multiply(level, builder.sum(members, share=False), share=False))
        outputs.append(builder.value(builder.sum(terms, share=False), share=False))
    return builder.finish(outputs, "unique")


def factor_summerge(codes, levels, groups):
    """Share between outputs the sums that the inputs of two levels have in common, the most frequent first.

    The inputs of each level of each output are a group, as in `factor_unique`; `merge_sums` shortens them.

    References
    ----------
    R. Prabhakar, S. Kuhar, R. Agrawal, C. J. Hughes, C. W. Fletcher, SumMerge: An Efficient Algorithm and
    Implementation for Weight Repetition-Aware DNN Inference, ICS 2021; the heuristic as the Q-gym paper (PACT 2022)
    describes it.
    """
    per_group, inputs = len(codes) // groups, codes.shape[1]
    if per_group * inputs > MAX_MERGED:
        raise ValueError(f"q: expected at most {MAX_MERGED} weights a group for 'summerge', got {per_group * inputs}")
    cdef Builder builder = Builder(codes, levels, groups)
    cdef vector[int32_t] terms
    outputs = []
    for group in range(groups):
        rows = levels[group * per_group :][:per_group]
        weights = np.take_along_axis(rows, codes[group * per_group :][:per_group].astype(np.intp), axis=1)
        keys = [(o, level) for o, row in enumerate(weights) for level in np.unique(row[row != 0]).tolist()]
        if len(keys) > MAX_GROUPS:
            raise ValueError(f"q: expected at most {MAX_GROUPS} levels of all outputs for 'summerge', got {len(keys)}")
        sets = [sum(1 << i for i in np.flatnonzero(weights[o] == level).tolist()) for o, level in keys]
        values = [2 * (group * inputs + i) for i in range(inputs)]
        for variable in merge_sums(sets, inputs):
            terms = [values[i] for i in list_bits(variable)]
            values.append(builder.sum(terms, share=False))
        sums = dict(zip(keys, sets))
        for o in range(per_group):
            products = []
            for level in np.unique(weights[o][weights[o] != 0]).tolist():
                terms = [values[i] for i in list_bits(sums[o, level])]
                products.append(builder.multiply(level, builder.sum(terms, share=False), share=True))
            terms = products
            outputs.append(builder.value(builder.sum(terms, share=False), share=True))
    return builder.finish(outputs, "summerge")


def list_bits(number):
    """The positions of the ones, ascending."""
    return [i for i, bit in enumerate(bin(number)[:1:-1]) if bit == "1"]


def factor_patterns(codes, levels, groups):
    """Cut the inputs into runs of g and compute each pattern of weights that occurs on a run once, up to sign.

    A pattern is a shorter one plus one product, so patterns share what they begin with; an output adds one pattern per
    run. Of g = 1 to 8 the one with the fewest operations is taken.

    References
    ----------
    V. L. Arlazarov, E. A. Dinic, M. A. Kronrod, I. A. Faradzev, On Economical Construction of the Transitive Closure of
    a Directed Graph, Soviet Mathematics Doklady 11, 1970 (the "four Russians", for Boolean sums).
    """
    lengths = range(1, min(MAX_PATTERN, codes.shape[1]) + 1)
    return min((build_patterns(codes, levels, groups, g) for g in lengths), key=lambda program: program.op.size)


def build_patterns(codes, levels, groups, int g):
    """The program of patterns of g inputs."""
    cdef Builder builder = Builder(codes, levels, groups)
    cdef const uint8_t[:, ::1] code = codes
    cdef vector[int32_t] terms
    cdef int32_t inputs = codes.shape[1], per_group = len(codes) // groups
    cdef int32_t o, i, first, start, pattern, product
    outputs = []
    for o in range(len(codes)):
        first = o // per_group * inputs
        row = levels[o].tolist()
        terms.clear()
        for start in range(0, inputs, g):
            pattern = NONE
            for i in range(start, min(start + g, inputs)):
                level = row[code[o, i]]
                product = builder.multiply(abs(level), 2 * (first + i), share=True)
                if product != NONE:
                    pattern = builder.add(pattern, product ^ (level < 0), share=True)
            if pattern != NONE:
                terms.push_back(pattern)
        outputs.append(builder.value(builder.sum(terms, share=False), share=True))
    return builder.finish(outputs, "patterns")


def factor_pair(codes, levels, groups, order=0):
    """Share any sums: drop one level of each output, then eliminate the most frequent signed pair until none recurs.

    With level d dropped an output is ``d * S + sum over m of m * R_m``: S sums all inputs, R_m sums those whose weight
    is d + m minus those whose weight is d - m. The rows S and R_m of all outputs of a group are reduced together. For
    integer levels d = 0, the commonest level of each output and its middle level are tried, and the cheapest program is
    taken; for fractions d = 0, because differences of levels would be rounded. Then matrices that are not too large are
    done with more care, small ones up to 64 times in other orders: those that `order`, a number, stands for.

    References
    ----------
    R. I. Hartley, Subexpression Sharing in Filters Using Canonic Signed Digit Multipliers, IEEE Transactions on
    Circuits and Systems II 43(10), 1996 (greedy elimination of the most frequent signed pair).
    """
    work = codes.size // groups * codes.shape[1]
    if work > MAX_PAIRED:
        raise ValueError(
            f"q: expected at most {MAX_PAIRED} = outputs * inputs^2 of a group for 'pair', got {work}; take 'patterns'"
        )
    if codes.shape[1] ** 2 > MAX_PAIRS:
        most = int(MAX_PAIRS**0.5)
        raise ValueError(f"q: expected at most {most} inputs of a group for 'pair', got {codes.shape[1]}; take 'patterns'")
    weights = np.take_along_axis(levels, codes.astype(np.intp), axis=1)
    choices = [np.zeros(len(codes), levels.dtype)]
    if levels.dtype.kind == "i":
        counts = np.stack([np.count_nonzero(codes == code, axis=1) for code in range(levels.shape[1])], axis=1)
        choices.append(np.take_along_axis(levels, counts.argmax(axis=1)[:, None], axis=1)[:, 0])
        choices.append(levels[:, levels.shape[1] // 2])
    choices = {dropped.tobytes(): dropped for dropped in choices}.values()
    programs = [(build_pairs(codes, levels, groups, weights, dropped, range(1)), dropped) for dropped in choices]
    program, dropped = min(programs, key=lambda entry: entry[0].op.size)
    if work > CAREFUL_WORK:
        return program
    seeds = range(1 + MAX_TRIES * order, 1 + MAX_TRIES * order + max(1, min(MAX_TRIES, TRIED_WORK // work)))
    careful = build_pairs(codes, levels, groups, weights, dropped, seeds)
    return min(program, careful, key=lambda program: program.op.size)


def build_pairs(codes, levels, groups, weights, dropped, seeds):
    """The program in which the weights (O, I) of output o are dropped[o] plus a rest; of some seeds the best."""
    cdef Builder builder = Builder(codes, levels, groups)
    cdef vector[vector[int32_t]] rows
    cdef vector[int32_t] terms
    cdef const int64_t[::1] row, term
    cdef int32_t total, i
    cdef Py_ssize_t k, r
    per_group, inputs = len(codes) // groups, codes.shape[1]
    outputs = []
    for group in range(groups):
        mine = slice(group * per_group, (group + 1) * per_group)
        rest = weights[mine] - dropped[mine, None]
        of_output, of_input = np.nonzero(rest)
        value = rest[of_output, of_input]
        magnitudes, of_magnitude = np.unique(np.abs(value), return_inverse=True)
        keys, of_row = np.unique(of_output * len(magnitudes) + of_magnitude, return_inverse=True)
        row, term = of_row.astype(np.int64), (2 * of_input + (value < 0)).astype(np.int64)

        rows.assign(len(keys) + 1, vector[int32_t]())
        for k in range(row.shape[0]):
            rows[row[k]].push_back(<int32_t>term[k])
        if dropped[mine].any():
            for i in range(inputs):
                rows.back().push_back(2 * i)
        shorten_rows(rows, group * inputs, inputs, seeds, builder)

        total = builder.sum(rows.back(), share=False)
        r = 0
        for o, level in enumerate(dropped[mine].tolist()):
            terms.clear()
            if level:
                terms.push_back(builder.multiply(level, total, share=True))
            while r < len(keys) and keys[r] // len(magnitudes) == o:
                magnitude = magnitudes[keys[r] % len(magnitudes)].item()
                terms.push_back(builder.multiply(magnitude, builder.sum(rows[r], share=False), share=True))
                r += 1
            outputs.append(builder.value(builder.sum(terms, share=False), share=True))
    return builder.finish(outputs, "pair")


cdef int shorten_rows(
    vector[vector[int32_t]]& rows, int32_t first, int32_t inputs, seeds, Builder builder
) except -1:
    """Rewrite rows of terms over the inputs, numbered from 0, into shorter rows of terms over the builder's values."""
    cdef PairElimination best, other
    cdef vector[int32_t] value_of           # [variable]
    cdef Pair pair
    cdef uint8_t op
    cdef size_t r, k
    cdef int32_t u, t
    for seed in seeds:
        other = PairElimination(rows, inputs, seed)
        while other.run(STEPS):
            PyErr_CheckSignals()
        if seed == seeds[0] or other.additions() < best.additions():
            best = move(other)
        if best.pairs().empty():
            break

    for u in range(inputs):
        value_of.push_back(first + u)
    for k in range(best.pairs().size()):
        pair = best.pairs()[k]
        op = SUBTRACT if pair.differ else ADD
        value_of.push_back(builder.emit(op, value_of[pair.u], value_of[pair.v], share=False))
    rows = best.rows()
    for r in range(rows.size()):
        for k in range(rows[r].size()):
            t = rows[r][k]
            rows[r][k] = 2 * value_of[t >> 1] + (t & 1)
    return 0


METHODS = {
    "pair": factor_pair,
    "saturate": None,  # imported when it is asked for
    "summerge": factor_summerge,
    "patterns": factor_patterns,
    "unique": factor_unique,
}
