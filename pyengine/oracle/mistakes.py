"""Known mistakes, each a small change of one step of the reference, and which of them a candidate made.

Most are bugs that shipped in some engine for this model family.  A mistake changes a copy of the model:
its operations (`model.op`) or its parameters (`model.weight`).  It is the candidate's when the changed
step, on the candidate's own inputs, gives the candidate's output.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .. import reference as ref
from ..checkpoint import value_head_orders
from ..reference import ReferenceModel
from ..trace import Trace
from .budget import Error
from .rerun import is_choice, layer_values, usable
from .rounding import to_bfloat16, to_float16, to_int8_and_back

NEAR = 8  # tokens before the first wrong one at which a state may have been lost


@dataclass(frozen=True)
class Mistake:
    """change(model, token) alters a copy of the model; token is where the candidate goes wrong first.

    at_token: it happens from one token on, looked for among the NEAR before the first wrong one
    """

    name: str
    change: Callable[[ReferenceModel, int], None]
    at_token: bool = False

    def made(self, model: ReferenceModel, token: int = 0) -> ReferenceModel:
        """The model with the mistake."""
        twin = copy.copy(model)
        twin.op = SimpleNamespace(**vars(model.op))
        self.change(twin, token)
        return twin


@dataclass(frozen=True)
class Match:
    """A mistake that gives the candidate's values; share of the tensor's budget, from 0 to 1."""

    name: str
    share: float

    def __str__(self):
        return self.name


# ---- changes ---------------------------------------------------------------------------------


def _operation(**functions):
    """Other operations in place of the model's."""

    def change(model, token):
        vars(model.op).update(functions)

    return change


def _parameter(suffixes, changed):
    """changed(values, model) in place of every parameter whose name ends so."""

    def change(model, token):
        stored, of = model.weight, model
        model.weight = lambda name, expert=None: (
            changed(stored(name, expert), of) if name.endswith(suffixes) else stored(name, expert))

    return change


def _instead(**others):
    """The parameter of the other name in place of each."""

    def change(model, token):
        stored = model.weight

        def weight(name, expert=None):
            for mine, other in others.items():
                if name.endswith((f"{mine}.weight", f".experts.{mine}")):
                    return stored(name.replace(mine, other), expert)
            return stored(name, expert)

        model.weight = weight

    return change


# ---- norms -----------------------------------------------------------------------------------


def _scaled_norm(scale):
    return _operation(rms_norm=lambda x, weight, eps: ref.unit_rms(x, eps) * scale(weight))


def _layer_norm(x, weight, eps):
    return ref.rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)


def _epsilon(factor):
    def change(model, token):
        norm, gated = model.op.rms_norm, model.op.rms_norm_gated
        model.op.rms_norm = lambda x, weight, eps: norm(x, weight, eps * factor)
        model.op.rms_norm_gated = lambda x, z, weight, eps: gated(x, z, weight, eps * factor)

    return change


def _gated_norm(function):
    return _operation(rms_norm_gated=function)


NORMS = [
    Mistake("the norm's +1 is missing: scaled by weight, not by 1 + weight", _scaled_norm(lambda w: w)),
    Mistake("the norm's +1 is there twice: scaled by 2 + weight", _scaled_norm(lambda w: 2 + w)),
    Mistake("the norm's weight is left out", _scaled_norm(lambda w: 1.0)),
    Mistake("1 + weight of the norm is rounded to bfloat16",
            _scaled_norm(lambda w: to_bfloat16(1 + w).astype(np.float64))),
    Mistake("the norm is left out", _operation(rms_norm=lambda x, weight, eps: x)),
    Mistake("the norm subtracts the mean, as LayerNorm does", _operation(rms_norm=_layer_norm)),
    Mistake("the norm's epsilon is 10 times the model's", _epsilon(10)),
    Mistake("the norm's epsilon is a tenth of the model's", _epsilon(0.1)),
    Mistake("the gated norm is scaled by 1 + weight, as the other norms are", _gated_norm(
        lambda x, z, weight, eps: (1 + weight) * ref.unit_rms(x, eps) * ref.silu(z))),
    Mistake("the gated norm takes its gate before the norm", _gated_norm(
        lambda x, z, weight, eps: weight * ref.unit_rms(x * ref.silu(z), eps))),
    Mistake("the gated norm's gate is sigmoid, not silu", _gated_norm(
        lambda x, z, weight, eps: weight * ref.unit_rms(x, eps) * ref.sigmoid(z))),
    Mistake("the gated norm's gate is left out", _gated_norm(
        lambda x, z, weight, eps: weight * ref.unit_rms(x, eps))),
]

# ---- full attention --------------------------------------------------------------------------


def _interleaved(x, positions, inv_freq):
    width = 2 * len(inv_freq)
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2),
                            np.arange(width, x.shape[-1])])
    turned = np.empty_like(x)
    turned[..., order] = ref.rotate(x[..., order], positions, inv_freq)
    return turned


def _full_width(model, token):
    n, theta = model.config.head_dim, model.config.rope_theta
    model.inv_freq = theta ** (-np.arange(0, n, 2) / n)


def _last_entries(x, positions, inv_freq):
    start = x.shape[-1] - 2 * len(inv_freq)
    return np.concatenate([x[..., :start], ref.rotate(x[..., start:], positions, inv_freq)], axis=-1)


def _frequencies(changed):
    def change(model, token):
        model.inv_freq = changed(model.inv_freq.astype(np.float64), model.config)

    return change


def _of_section(keep):
    """Only the frequencies of the temporal section turn: the others' positions are taken for 0."""
    return _frequencies(lambda f, c: np.where(keep(np.arange(len(f)), c), f, 0.0))


def _restarted_positions(model, token):
    model.op.rotate = lambda x, positions, inv_freq: ref.rotate(
        x, np.where(positions >= token, positions - token, positions), inv_freq)


def _scores(changed):
    return _operation(attention_scores=changed)


def _without_mask(query, keys):
    return query @ keys.T * query.shape[1] ** -0.5


def _split_whole(q, heads):
    return [part.reshape(len(q), heads, -1) for part in np.split(q, 2, axis=1)]


ATTENTION = [
    Mistake("RoPE turns pairs (2i, 2i + 1), not halves", _operation(rotate=_interleaved)),
    Mistake("RoPE turns the whole head: the partial rotary width is dropped", _full_width),
    Mistake("RoPE turns the last entries of the head, not the first", _operation(rotate=_last_entries)),
    Mistake("RoPE is left out", _operation(rotate=lambda x, positions, inv_freq: x)),
    Mistake("RoPE turns the other way", _frequencies(lambda f, c: -f)),
    Mistake("RoPE's base is 10,000", _frequencies(
        lambda f, c: 10000.0 ** (-np.arange(len(f)) / len(f)))),
    Mistake("RoPE's sections are misread: only the temporal one turns, taken as a block",
            _of_section(lambda i, c: i < (c.mrope_section or (len(i),))[0])),
    Mistake("RoPE's sections are misread: only the temporal one turns, taken as interleaved",
            _of_section(lambda i, c: i % 3 == 0)),
    Mistake("RoPE's frequencies are rounded to bfloat16", _frequencies(lambda f, c: to_bfloat16(f))),
    Mistake("RoPE's frequencies are rounded to float16", _frequencies(lambda f, c: to_float16(f))),
    Mistake("positions start again", _restarted_positions, at_token=True),
    Mistake("query and gate are split across the whole, not head by head",
            _operation(split_query_and_gate=_split_whole)),
    Mistake("query and gate are exchanged", _operation(
        split_query_and_gate=lambda q, heads: ref.split_query_and_gate(q, heads)[::-1])),
    Mistake("query heads use the key heads in turn, not in groups", _operation(
        key_value_head=lambda head, heads, kv_heads: head % kv_heads)),
    Mistake("the attention scores are not scaled", _scores(
        lambda query, keys: ref.attention_scores(query * query.shape[1] ** 0.5, keys))),
    Mistake("the causal mask is missing", _scores(_without_mask)),
    Mistake("a gate is left out", _operation(gated=lambda x, gate: x)),
    Mistake("a gate is without its sigmoid", _operation(gated=lambda x, gate: x * gate)),
    Mistake("a gate is silu, not sigmoid", _operation(gated=lambda x, gate: x * ref.silu(gate))),
]

# ---- delta net -------------------------------------------------------------------------------

_ROWS = {"in_proj_qkv": "channels", "in_proj_z": "values", "in_proj_b": "heads", "in_proj_a": "heads",
         "conv1d": "channels", "A_log": "heads", "dt_bias": "heads"}


def _reordered(parameter, inverse, axis=0):
    """A parameter's value heads in the order of a GGUF (tiled), or un-tiled once more."""

    def changed(values, model):
        order = value_head_orders(model.config)[_ROWS.get(parameter, "values")]
        return np.take(values, np.argsort(order) if inverse else order, axis=axis)

    return _parameter((f"linear_attn.{parameter}.weight", f"linear_attn.{parameter}"), changed)


def _tiled(parameter, axis=0):
    return [Mistake(f"{parameter}: the value heads are left in the file's tiled order",
                    _reordered(parameter, True, axis)),
            Mistake(f"{parameter}: the value heads are un-tiled twice",
                    _reordered(parameter, False, axis))]


def _plain_conv1d(x, weight, conv_state):
    taps = weight.shape[1]
    inputs = np.concatenate([conv_state, x])
    conv_state[:] = inputs[len(x):]
    return sum(weight[:, j] * inputs[j:j + len(x)] for j in range(taps))


def _delta_rule(step):
    """A recurrence with another order of decay, reading and update: step(state, k, v, beta, decay)
    -> the new state."""

    def delta_rule(query, key, value, beta, log_decay, recurrent_state):
        out, state = np.empty_like(value), recurrent_state
        for t in range(len(query)):
            decay, b = np.exp(log_decay[t])[:, None, None], beta[t][:, None]
            state[:] = step(state, key[t][..., None], value[t], b, decay)
            out[t] = np.sum(state * query[t][..., None], axis=1)
        return out

    return _operation(delta_rule=delta_rule)


def _updated(state, k, v, beta, read):
    return state + k * ((v - np.sum(read * k, axis=1)) * beta)[:, None, :]


def _decay_by(exponent):
    return _operation(log_decay=exponent)


def _swapped_query_and_key(query, key, value, beta, log_decay, state):
    scale = query.shape[-1] ** -0.5
    return ref.delta_rule(key * scale, query / scale, value, beta, log_decay, state)


def _tiled_heads_in_groups(x, ratio):
    head = np.arange(x.shape[1] * ratio)
    return x[:, (head % ratio * x.shape[1] + head // ratio) // ratio]


DELTA_NET = [
    Mistake("grouped value heads are paired with key heads as if tiled (g mod n_k)", _operation(
        repeat_heads=lambda x, ratio: np.tile(x, (1, ratio, 1)))),
    Mistake("tiled value heads are paired with key heads as if grouped (t div ratio)", _operation(
        repeat_heads=_tiled_heads_in_groups)),
    *(mistake for parameter in _ROWS for mistake in _tiled(parameter)),
    *_tiled("out_proj", axis=1),
    Mistake("conv1d's taps are reversed", _parameter("conv1d.weight", lambda w, m: w[..., ::-1])),
    Mistake("conv1d's weight is read as [taps, channels]", _parameter(
        "conv1d.weight", lambda w, m: w.reshape(w.shape[-1], -1).T.reshape(w.shape))),
    Mistake("the silu after conv1d is left out", _operation(causal_conv1d=_plain_conv1d)),
    Mistake("in_proj_a and in_proj_b are exchanged", _instead(in_proj_a="in_proj_b",
                                                              in_proj_b="in_proj_a")),
    Mistake("query and key are exchanged", _operation(delta_rule=_swapped_query_and_key)),
    Mistake("the l2 norm of query and key is left out", _operation(l2_norm=lambda x, scale: x * scale)),
    Mistake("the query is not scaled by 1 / sqrt(dk)", _operation(
        l2_norm=lambda x, scale: ref.l2_norm(x, 1.0))),
    Mistake("ssm_a, which is -exp(A_log), is taken for A_log", _decay_by(
        lambda a, a_log, dt_bias: ref.log_decay(a, -np.exp(a_log), dt_bias))),
    Mistake("A_log is taken for its exponential", _decay_by(
        lambda a, a_log, dt_bias: -a_log * ref.softplus(a + dt_bias))),
    Mistake("A_log is rounded to bfloat16", _decay_by(
        lambda a, a_log, dt_bias: ref.log_decay(a, to_bfloat16(a_log), dt_bias))),
    Mistake("dt_bias is left out", _decay_by(lambda a, a_log, dt_bias: ref.log_decay(a, a_log, 0.0))),
    Mistake("softplus is left out of the decay", _decay_by(
        lambda a, a_log, dt_bias: -np.exp(a_log) * (a + dt_bias))),
    Mistake("the decay is left out", _decay_by(lambda a, a_log, dt_bias: np.zeros_like(a))),
    Mistake("beta is without its sigmoid", _operation(sigmoid=lambda x: x)),
    Mistake("beta is doubled", _operation(sigmoid=lambda x: 2 * ref.sigmoid(x))),
    Mistake("the delta rule reads the state before its decay", _delta_rule(
        lambda state, k, v, b, decay: _updated(state * decay, k, v, b, state))),
    Mistake("the delta rule decays the state after its update", _delta_rule(
        lambda state, k, v, b, decay: _updated(state, k, v, b, state) * decay)),
    Mistake("the delta rule adds the value without what the state holds", _delta_rule(
        lambda state, k, v, b, decay: _updated(state * decay, k, v, b, 0 * state))),
]

# ---- states lost -----------------------------------------------------------------------------


def _once(token, length):
    return [0, token]


def _every_chunk(token, length):
    return range(0, length, token)


def _every_token(token, length):
    return [0, *range(token, length)]


def _pieces(starts, length):
    starts = list(starts)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length])]


def _lost_recurrent(starts):
    def change(model, token):
        rule = model.op.delta_rule

        def delta_rule(query, key, value, beta, log_decay, state):
            return np.concatenate([rule(query[p], key[p], value[p], beta[p], log_decay[p],
                                        np.zeros_like(state))
                                   for p in _pieces(starts(token, len(query)), len(query))])

        model.op.delta_rule = delta_rule

    return change


def _lost_conv(starts):
    def change(model, token):
        conv = model.op.causal_conv1d
        model.op.causal_conv1d = lambda x, weight, state: np.concatenate(
            [conv(x[p], weight, np.zeros_like(state))
             for p in _pieces(starts(token, len(x)), len(x))])

    return change


def _late_conv(starts):
    """The window is the one before, in every piece but the first."""

    def change(model, token):
        conv = model.op.causal_conv1d

        def causal_conv1d(x, weight, state):
            window = np.concatenate([state, x[:token]])[-len(state) - 1:-1]
            first, *others = _pieces(starts(token, len(x)), len(x))
            return np.concatenate([conv(x[first], weight, state),
                                   *(conv(x[p], weight, window.copy()) for p in others)])

        model.op.causal_conv1d = causal_conv1d

    return change


def _both(*changes):
    def change(model, token):
        for one in changes:
            one(model, token)

    return change


def _lost_keys(model, token):
    scores = model.op.attention_scores

    def attention_scores(query, keys):
        score = scores(query, keys)
        score[token:, :token] = -np.inf
        return score

    model.op.attention_scores = attention_scores


STATES = [
    Mistake("the recurrent state is dropped", _lost_recurrent(_once), True),
    Mistake("the recurrent state is dropped at every chunk, the first", _lost_recurrent(_every_chunk),
            True),
    Mistake("the recurrent state is dropped at every token, the first", _lost_recurrent(_every_token),
            True),
    Mistake("the convolution's state is dropped", _lost_conv(_once), True),
    Mistake("the convolution's state is dropped at every token, the first", _lost_conv(_every_token),
            True),
    Mistake("the convolution's state is a token old", _late_conv(_once), True),
    Mistake("the convolution's state is a token old and stands still", _late_conv(_every_token), True),
    Mistake("the convolution's and the recurrent state are dropped",
            _both(_lost_conv(_once), _lost_recurrent(_once)), True),
    Mistake("the convolution's and the recurrent state are dropped at every token, the first",
            _both(_lost_conv(_every_token), _lost_recurrent(_every_token)), True),
    Mistake("earlier keys and values are dropped", _lost_keys, True),
]

# ---- router and experts ----------------------------------------------------------------------


def _weights(function):
    return _operation(routing_weights=function)


def _chosen(p, selected):
    return np.take_along_axis(p, selected, axis=-1)


def _gelu(gate, up):
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def _interleaved_gate_up(model, token):
    stored = model.weight

    def weight(name, expert=None):
        for start, part in enumerate(("gate_proj", "up_proj")):
            if name.endswith(f".experts.{part}"):
                stem = name.removesuffix(part)
                both = [stored(f"{stem}{one}", expert) for one in ("gate_proj", "up_proj")]
                return np.concatenate(both)[start::2]
        return stored(name, expert)

    model.weight = weight


def _next_expert(model, token):
    stored, count = model.weight, model.config.num_experts
    model.weight = lambda name, expert=None: stored(
        name, None if expert is None else (expert + 1) % count)


EXPERTS = [
    Mistake("the routing weights are not renormalised", _weights(_chosen)),
    Mistake("the routing weights are a softmax of the chosen probabilities", _weights(
        lambda p, selected: ref.softmax(_chosen(p, selected)))),
    Mistake("the routing weights belong to the experts in the opposite order", _weights(
        lambda p, selected: ref.routing_weights(p, selected)[:, ::-1])),
    Mistake("the router uses sigmoid, not softmax", _operation(router_probabilities=ref.sigmoid)),
    Mistake("the routed experts are not weighted", _operation(weighted=lambda y, weight: y)),
    Mistake("the router takes the experts of the smallest probability", _operation(
        select_experts=lambda p, top_k: ref.select_experts(-p, top_k))),
    Mistake("gate and up are swapped", _operation(swiglu=lambda gate, up: ref.swiglu(up, gate))),
    Mistake("gate and up of the routed experts are taken as interleaved", _interleaved_gate_up),
    Mistake("silu is left out of the experts", _operation(swiglu=lambda gate, up: gate * up)),
    Mistake("the experts use gelu, not silu", _operation(swiglu=_gelu)),
    Mistake("the experts are numbered from 1", _next_expert),
]

# ---- anywhere --------------------------------------------------------------------------------


def _inputs(rounded):
    return _operation(linear=lambda x, weight: ref.linear(rounded(x), weight))


def _transposed(values, model):
    return values.T if values.ndim == 2 and values.shape[0] == values.shape[1] else values


def _embeddings_as_head(model, token):
    stored = model.weight
    model.weight = lambda name, expert=None: stored(
        "model.embed_tokens.weight" if name == "lm_head.weight" else name, expert)


ANYWHERE = [
    Mistake("a residual is left out", _operation(add=lambda x, y: y)),
    Mistake("what is added to the residual is left out", _operation(add=lambda x, y: x)),
    Mistake("a square weight is transposed", _parameter("weight", _transposed)),
    Mistake("the embeddings are used for lm_head", _embeddings_as_head),
    Mistake("the weights are rounded to bfloat16", _parameter("", lambda w, m: to_bfloat16(w))),
    Mistake("the weights are rounded to float16", _parameter("", lambda w, m: to_float16(w))),
    Mistake("the activations are rounded to bfloat16 before a product", _inputs(to_bfloat16)),
    Mistake("the activations are rounded to float16 before a product", _inputs(to_float16)),
    Mistake("the activations are int8 in blocks of 32", _inputs(
        lambda x: to_int8_and_back(x.astype(np.float32)))),
]

MISTAKES = [*NORMS, *ATTENTION, *DELTA_NET, *STATES, *EXPERTS, *ANYWHERE]


# ---- diagnosis -------------------------------------------------------------------------------


class _Reached(Exception):
    """The tensor in question has been computed."""


def diagnose(model: ReferenceModel, candidate: Trace, name: str, token: int, own: dict,
             budget: Error | None) -> list[Match]:
    """The mistakes that turn the candidate's own inputs of `name` into its output; the nearest first.

    token: where it goes wrong first; own: what the right operations make of the candidate's inputs;
    budget: of the operation alone, None for the experts' numbers
    """
    if candidate.tensors[name].shape != own[name].shape:
        return []
    if name == "model.embed_tokens":
        return _other_ids(model, candidate, own[name])
    matches = []
    if not is_choice(name):
        matches = _in_the_values(candidate.tensors[name], own[name], budget)
    with np.errstate(all="ignore"):
        if token == 0:
            matches += _left_padding(model, candidate, name, own, budget)
        matches += _reproduced(model, candidate, name, token, own, budget)
    return sorted(matches, key=lambda match: match.share)


def _reproduced(model, candidate, name, token, own, budget):
    used = _operations_before(model, candidate, name, own)
    for mistake in MISTAKES:
        if _changed_operations(mistake.made(model, 1), model).isdisjoint(used):
            continue
        places = range(token, max(0, token - NEAR), -1) if mistake.at_token else (0,)
        for place in places:
            value = _mistaken(mistake.made(model, place), candidate, name, own)
            share = _share(candidate.tensors[name], value, budget)
            if share <= 1:
                at = f" at token {place}" if mistake.at_token else ""
                yield Match(mistake.name + at, share)
                break


def _changed_operations(mistaken, model) -> set[str]:
    """The operations that a mistake replaces; all of them if it changes something else too."""
    same = vars(mistaken).get("weight") is vars(model).get("weight") and (
        mistaken.inv_freq is model.inv_freq)
    names = vars(model.op)
    return {n for n in names if not same or vars(mistaken.op)[n] is not names[n]}


def _operations_before(model, candidate, name, own) -> set[str]:
    """The operations that run before the tensor in its layer."""
    used, twin = set(), copy.copy(model)

    def noted(operation, function):
        def call(*arguments):
            used.add(operation)
            return function(*arguments)

        return call

    twin.op = SimpleNamespace(**{n: noted(n, function) for n, function in vars(model.op).items()})
    _mistaken(twin, candidate, name, own)
    return used


def _share(value, mistaken, budget: Error | None) -> float:
    """Of the budget; of experts' numbers, which have none: 0 for the same choice."""
    if mistaken is None or mistaken.shape != value.shape:
        return np.inf
    if budget is None:
        return 0.0 if np.array_equal(np.sort(value), np.sort(mistaken)) else np.inf
    return Error.between(value, mistaken.astype(np.float64)).share_of(budget)


def _mistaken(model, candidate, name, own) -> np.ndarray | None:
    """The tensor as a mistaken model computes it from the candidate's inputs."""
    found = {}

    def visit(reached, value):
        if reached == name:
            found[name] = value
            raise _Reached

    try:
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            before = f"model.layers.{index - 1}" if index else "model.embed_tokens"
            layer_values(model, candidate, index, _input(model, candidate, before, own), visit)
        else:
            before = f"model.layers.{model.config.num_hidden_layers - 1}"
            _head(model, candidate, _input(model, candidate, before, own), visit)
    except _Reached:
        pass
    except (ValueError, IndexError, KeyError):
        pass  # the mistake does not fit these shapes
    return found.get(name)


def _input(model, candidate, name, own):
    theirs = usable(candidate, name, own[name], model.config.num_experts)
    return own[name] if theirs is None else theirs


def _head(model, candidate, hidden, visit):
    def record(name, value):
        visit(name, value)
        return usable(candidate, name, value, 0)

    with np.errstate(all="ignore"):
        model.run_head(hidden, record)


def _left_padding(model, candidate, name, own, budget):
    """Unmasked tokens before the first, seen in a first layer that is a delta net: the layer run on
    them and on the candidate's own values."""
    c = model.config
    if not name.startswith("model.layers.0.linear_attn"):
        return
    pads = dict.fromkeys(token for token in (c.pad_token_id, *c.eos_token_ids, 0)
                         if token is not None and token < c.vocab_size)
    hidden = _input(model, candidate, "model.embed_tokens", own)
    for pad in pads:
        for count in range(1, NEAR + 1):
            value = _padded(model, candidate, name, pad, count, hidden)
            share = _share(candidate.tensors[name], value, budget)
            if share <= 1:
                yield Match(f"left padding is not masked: {count} tokens {pad} before the first", share)


def _padded(model, candidate, name, pad, count, hidden):
    found = {}

    def record(reached, value):
        theirs = usable(candidate, reached, value[count:], model.config.num_experts)
        if reached == name:
            found[name] = value[count:]
            raise _Reached
        return None if theirs is None else np.concatenate([value[:count], theirs])

    with contextlib.suppress(_Reached):
        model.run_layer(0, np.concatenate([model.embed([pad] * count), hidden]), record)
    return found.get(name)


def _in_the_values(value, own, budget: Error) -> list[Match]:
    """What can be seen without running anything: another scale, rows of other tokens."""
    matches = []
    with np.errstate(all="ignore"):
        scale = float(np.sum(value * own) / np.sum(own * own))
    if np.isfinite(scale) and abs(scale - 1) > 1e-3:
        share = _share(value, own * scale, budget.times(max(1.0, abs(scale))))
        if share <= 1 and np.any(own):
            matches.append(Match(f"the values are {scale:.6g} times what they should be", share))
    if len(value) > 2 and _share(value[1:], own[:-1], budget) <= 1:
        matches.append(Match("each row is that of the token before", 0.0))
    if len(value) > 2 and _share(value[:-1], own[1:], budget) <= 1:
        matches.append(Match("each row is that of the token after", 0.0))
    return matches


def _other_ids(model, candidate, own) -> list[Match]:
    """Embeddings of other tokens: another vocabulary, or ids that were shifted."""
    table = model.embed(np.arange(model.config.vocab_size)).astype(np.float32)
    rows = {row.tobytes(): token for token, row in enumerate(table)}
    value = np.ascontiguousarray(candidate.tensors["model.embed_tokens"], np.float32)
    wrong = np.flatnonzero((value != own.astype(np.float32)).any(axis=-1))
    found = [(int(candidate.ids[i]), rows.get(value[i].tobytes())) for i in wrong]
    if not found or None in [row for _, row in found]:
        return []
    id_, row = found[0]
    return [Match(f"the embeddings are those of other ids ({row} for {id_}): another vocabulary, or "
                  "ids that were changed", 0.0)]
