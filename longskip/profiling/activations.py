"""What a training step keeps beside weights and states: a U-ViT's operations and their derivatives, played without torch.

A step's peak is a moment, not a sum: the derivative of an operation makes gradients while what it needs is still kept,
and drops both afterwards. ``activations`` writes the operations of one step down as a tape (what each keeps, what its
derivative makes), plays the derivatives from the last to the first, and remembers the worst moment. Nothing of size
tokens × tokens is there: attention is a fused kernel.

Where the peak is, per row of T·h elements (h the width, r the MLP's ratio, S what is kept at the end of the forward pass):

- without checkpointing: the last block's MLP. The head has dropped its 2 rows, the gradient of the block's output is 1
  row, and the derivative of the second linear layer makes r rows: S − 2 + 1 + r. GELU's derivative then makes r rows
  beside them while the r rows after GELU are gone, which is as much. Every earlier block has dropped 8 + 2r rows and
  more, and has left at most 2: the gradients of a skip's concatenated pair, of which one half waits for the block that
  the skip came from. With our kernels every MLP keeps r rows less, and its one derivative makes 2r + 1: S + 2r.
- with adaLN in plain torch the head's modulation makes 3 rows, its linear layer's input having gone for the gradient: S + 3,
  more than the last MLP's S − 2 + r where r < 5. A head wider than the tokens (p²c > h) can put it into the loss.
- every block checkpointed: S is one row per block, and a block that is computed again adds its 8 + 2r rows. Going
  down through the blocks with skips each drops its 1 row and leaves 2, so the worst block is the lowest that takes a skip.
- flat layout at few tokens: the gradients of a block's weights are joined into one tensor while they still lie apart, at
  the end of the block's derivative: twice the block's weights. Weights do not grow with the batch, activations do.

The forward pass is never the worst moment of a block: its derivative has the same tensors, and gradients beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from longskip.errors import SpecError
from longskip.models.specs import UViTSpec

Kernels = Literal["torch", "triton"]
Layout = Literal["named", "flat"]
Gradients = Literal["apart", "given", "kept"]


@dataclass(frozen=True)
class Activations:
    """Bytes of one step of one rank, beside weights, their persistent gradients and the optimizer's states.

    ``saved``: what autograd keeps at the end of the forward pass (``UViTSpec.saved_bytes``); ``batch``: latents, noise,
    the noised latents and the prediction, which live through the step; ``temporaries``: what is there beside both at the
    worst moment; ``weight_gradients``: the part of it that is gradients of weights on their way to where they are
    collected; ``peak`` = saved + batch + temporaries (temporaries may be below 0: part of what was saved is gone by
    then). ``moment`` names the operation whose derivative is the worst moment ("blocks.20 fc2").
    """

    saved: int
    batch: int
    temporaries: int
    weight_gradients: int
    moment: str

    @property
    def peak(self) -> int:
        return self.saved + self.batch + self.temporaries


@dataclass
class _Node:
    """One operation: what it keeps, and what its derivative makes: ``(inputs that share it, bytes)``, 0 bytes for the
    gradient of the output itself; ``temp``: what the derivative needs besides for a moment; ``weight``: elements."""

    name: str
    unit: str
    outs: tuple[str, ...]
    grads: tuple[tuple[tuple[str, ...], int], ...]
    saves: tuple[str, ...] = ()
    temp: int = 0
    weight: int = 0
    joins: int = 0  # elements of a flat parameter whose gradient is joined here
    frame: int | None = None


Grads = tuple[tuple[str, ...], int]


@dataclass
class _Tape:
    """The operations of a step in order; the methods write those that several parts of the model share."""

    ours: bool
    nodes: list[_Node] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # storage -> bytes
    frames: dict[int, tuple[str, ...]] = field(default_factory=dict)  # checkpointed block -> its inputs
    unit: str = ""
    frame: int | None = None
    prediction: str = ""

    def add(
        self,
        name: str,
        outs: dict[str, int],
        *grads: Grads,
        saves: tuple[str, ...] = (),
        temp: int = 0,
        weight: int = 0,
        joins: int = 0,
    ) -> None:
        self.sizes |= outs
        self.nodes.append(_Node(name, self.unit, tuple(outs), grads, saves, temp, weight, joins, self.frame))

    def open(self, weights: int) -> None:
        """The views of a unit's flat parameter are made first, so their gradients are joined last."""
        self.add("join", {}, joins=weights)

    def split(self, name: str, whole: str, size: int, *views: str) -> None:
        """Views of one tensor: no bytes forward, their gradients put together into one of ``size`` backward."""
        self.nodes.append(_Node(name, self.unit, views, (((whole,), size),), frame=self.frame))

    def statistics(self, size: _Sizes, key: str, number: str) -> dict[str, int]:
        return {f"{key}.mean{number}": size.stat, f"{key}.rstd{number}": size.stat}

    def norm(self, size: _Sizes, h: int, key: str, number: str, x: str) -> None:
        stats = self.statistics(size, key, number)
        outs = {f"{key}.normed{number}": size.row, **stats}
        self.add(f"norm{number}", outs, ((x,), size.row), saves=(x, *stats), weight=2 * h)

    def modulation(self, size: _Sizes, h: int, learnt: bool, key: str, vectors: tuple[str, ...]) -> None:
        """The time embedding, ``learnt`` or the bare sinusoid → shifts, scales and gates, each a view of one tensor."""
        silu, ada, wide = f"{key}.silu", f"{key}.ada", len(vectors) * size.vector
        self.sizes[silu] = size.vector
        if learnt:
            self.add("time silu", {silu: size.vector}, (("time",), size.vector), saves=("time",))
        grads = ((((silu,), size.vector),)) if learnt else ()
        self.add("ada", {ada: wide}, *grads, saves=(silu,), weight=len(vectors) * (h + 1) * h)
        self.split("chunk", ada, wide, *(f"{key}.{vector}" for vector in vectors))

    def adaln(self, size: _Sizes, key: str, number: str, x: str) -> None:
        """Norm without weights, then scale and shift."""
        row, vector, stats = size.row, size.vector, self.statistics(size, key, number)
        shift, scale, normed = f"{key}.shift{number}", f"{key}.scale{number}", f"{key}.normed{number}"
        if self.ours:
            grads: tuple[Grads, ...] = (((x,), row), ((scale,), vector), ((shift,), vector))
            self.add(f"adaln{number}", {normed: row, **stats}, *grads, saves=(x, f"{key}.ada", *stats))
            return
        plain, more = f"{key}.plain{number}", f"{key}.more{number}"
        self.add(f"norm{number}", {plain: row, **stats}, ((x,), row), saves=(x, *stats))
        self.add("scale", {more: vector}, ((scale,), 0))
        grads = (((shift,), vector), ((plain,), row), ((more,), vector))
        # two products of all tokens, and then the sums over them that are the gradients of shift and 1 + scale
        self.add(f"adaln{number}", {normed: row}, *grads, saves=(plain, more), temp=2 * (row - vector))

    def gated(self, size: _Sizes, key: str, gate: str, x: str, y: str, out: str) -> None:
        grads = (((x,), 0), ((f"{key}.{gate}",), size.vector), ((y,), size.row))
        self.add(gate, {out: size.row}, *grads, saves=(f"{key}.ada", y), temp=0 if self.ours else size.row)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one micro-batch in bytes; ``row``: all tokens by width, ``vector``: one width per image."""

    row: int
    vector: int
    wide: int  # all tokens by width in float32
    stat: int  # one float32 per token
    heads: int  # one float32 per token and head
    linear: int  # all tokens by the head's outputs
    out: int  # the prediction
    target: int  # the prediction in float32
    patches: int
    text: int
    label: int
    noised: int
    scalars: int  # time, weight and loss per image; loss and its gradient


def activations(
    spec: UViTSpec,
    batch: int,
    dtype_bytes: int,
    checkpointing: int = 0,
    latent_size: tuple[int, int] | None = None,
    n_txt: int | None = None,
    *,
    kernels: Kernels = "torch",
    prediction: Literal["v", "x"] = "v",
    layout: Layout = "named",
    gradients: Gradients = "given",
) -> Activations:
    """The bytes that one forward and backward pass of ``batch`` images keeps and makes; see the module's text.

    ``checkpointing``, ``latent_size``, ``n_txt`` and ``kernels`` as ``UViTSpec.saved_bytes``; ``prediction``: "v" makes a
    target of its own, "x" has one. ``gradients`` of weights: "given" away as they come (to DeepSpeed's buckets), "kept"
    until the end of the step, or "apart": not counted. In the flat layout those of one unit lie apart until the last of
    them is there, and are then joined. Raises SpecError on sizes that do not fit, and on unknown kernels.
    """
    if kernels not in ("torch", "triton"):
        raise SpecError(f"kernels {kernels!r} are unknown", cure="take 'torch' or 'triton'")
    if layout not in ("named", "flat") or gradients not in ("apart", "given", "kept"):
        raise SpecError(
            f"layout {layout!r} with gradients {gradients!r} is unknown",
            cure="take 'named' or 'flat', and 'apart', 'given' or 'kept'",
        )
    sizes = _sizes_of(spec, batch, dtype_bytes, latent_size, n_txt)
    tape = _write(spec, sizes, checkpointing, kernels, prediction)
    return _play(tape, sizes, dtype_bytes, layout, gradients)


def _sizes_of(
    spec: UViTSpec, batch: int, dtype_bytes: int, latent_size: tuple[int, int] | None, n_txt: int | None
) -> _Sizes:
    height, width = latent_size or spec.latent_size
    counts = spec.flops(batch, (height, width), n_txt)
    tokens, pixels = counts.tokens, spec.patch**2
    text = (tokens - counts.image_tokens) // batch - (spec.n_extra - spec.n_txt)
    return _Sizes(
        row=tokens * spec.width * dtype_bytes,
        vector=batch * spec.width * dtype_bytes,
        wide=tokens * spec.width * max(4, dtype_bytes),
        stat=tokens * 4,
        heads=tokens * spec.n_heads * 4,
        linear=tokens * pixels * spec.c_out * dtype_bytes,
        out=counts.image_tokens * pixels * spec.c_out * dtype_bytes,
        target=counts.image_tokens * pixels * spec.c_out * 4,
        patches=counts.image_tokens * pixels * spec.channels * dtype_bytes,
        text=batch * text * spec.text_width * dtype_bytes,
        label=8 * batch if spec.n_classes else 0,
        noised=counts.image_tokens * pixels * spec.channels * 4,
        scalars=12 * batch + 8,
    )


# --- the tape ---------------------------------------------------------------------------------------------------------


def _write(spec: UViTSpec, size: _Sizes, checkpointing: int, kernels: Kernels, prediction: str) -> _Tape:
    tape = _Tape(kernels == "triton")
    _write_embed(tape, spec, size)
    tokens, skips = "tokens", list[str]()
    for index in range(spec.n_blocks):
        skip = skips.pop() if spec.has_skip(index) else None
        before, tokens = tokens, f"{index}.out"
        tape.unit = f"blocks.{index}"
        if checkpointing and index % checkpointing == 0:
            tape.frame = index
            given = (before, *([skip] if skip else []), *(["time"] if spec.adaln else []))
            tape.frames[index] = given
        _write_block(tape, spec, size, str(index), before, skip)
        tape.frame = None
        if index < spec.depth // 2:
            skips.append(tokens)
    _write_head(tape, spec, size, tokens, prediction)
    return tape


def _write_embed(tape: _Tape, spec: UViTSpec, size: _Sizes) -> None:
    """Patches, text, time and label → tokens. Of the inputs only the patches are tensors of their own."""
    h, tape.unit = spec.width, "embed"
    tape.sizes |= {"patches": size.patches, "text": size.text, "label": size.label, "sinusoid": size.vector}
    tape.open(sum(p.numel for p in spec.parameters_of("embed")))
    if spec.time_mlp:
        wide = 4 * size.vector
        tape.add("time fc1", {"fc1": wide}, saves=("sinusoid",), weight=4 * h * h + 4 * h)
        tape.add("time silu", {"silu": wide}, (("fc1",), wide), saves=("fc1",))
        tape.add("time fc2", {"time": size.vector}, (("silu",), wide), saves=("silu",), weight=4 * h * h + h)
    else:
        tape.sizes["time"] = size.vector
    patch = spec.patch**2 * spec.channels
    tape.add(
        "patches", {}, saves=("patches",)
    )  # their derivative comes after that of the sum, which is the last large one
    joined = ("time",) if spec.time_mlp else ()
    tape.add(
        "tokens", {"tokens": size.row}, *([(joined, 0)] if joined else []),
        saves=(*(["text"] if spec.n_txt else []), *(["label"] if spec.n_classes else [])),
        temp=size.row, weight=spec.n_tokens * h + (patch + 1) * h + (spec.text_width + 1) * h * bool(spec.n_txt),
    )  # fmt: skip


def _write_block(tape: _Tape, spec: UViTSpec, size: _Sizes, key: str, x: str, skip: str | None) -> None:
    h, row = spec.width, size.row

    def name(part: str) -> str:
        return f"{key}.{part}"

    tape.open(sum(p.numel for p in spec.parameters_of(f"blocks.{key}")))
    if skip is not None and tape.ours:
        tape.add("skip", {name("in"): row}, ((x,), row), ((skip,), row), saves=(x, skip), weight=2 * h * h + h)
    elif skip is not None:
        tape.add("cat", {name("pair"): 2 * row}, ((x, skip), 0))
        tape.add("skip", {name("in"): row}, ((name("pair"),), 2 * row), saves=(name("pair"),), weight=2 * h * h + h)
    x = x if skip is None else name("in")
    if spec.adaln:
        tape.modulation(size, h, spec.time_mlp, key, ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"))
        tape.adaln(size, key, "1", x)
    else:
        tape.norm(size, h, key, "1", x)
    _write_attention(tape, spec, size, key)
    total = name("total")
    if spec.adaln and tape.ours:
        tape.add(
            "gated_adaln", {total: row, name("normed2"): row, **tape.statistics(size, key, "2")},
            ((x,), row), ((name("proj"),), row), *(((name(v),), size.vector) for v in ("gate1", "scale2", "shift2")),
            saves=(total, name("proj"), name("ada"), name("mean2"), name("rstd2")),
        )  # fmt: skip
    elif spec.adaln:
        tape.gated(size, key, "gate1", x, name("proj"), total)
        tape.adaln(size, key, "2", total)
    elif tape.ours:
        tape.add(
            "norm2", {total: row, name("normed2"): row, **tape.statistics(size, key, "2")}, ((x, name("proj")), row),
            saves=(total, name("mean2"), name("rstd2")), weight=2 * h,
        )  # fmt: skip
    else:
        tape.add("residual", {total: row}, ((x, name("proj")), 0))
        tape.norm(size, h, key, "2", total)
    _write_mlp(tape, spec, size, key)
    if spec.adaln:
        tape.gated(size, key, "gate2", total, name("mlp"), name("out"))
    else:
        tape.add("residual", {name("out"): row}, ((total, name("mlp")), 0))


def _write_attention(tape: _Tape, spec: UViTSpec, size: _Sizes, key: str) -> None:
    h, row, qkv, q, k = spec.width, size.row, f"{key}.qkv", f"{key}.q", f"{key}.k"
    tape.add("qkv", {qkv: 3 * row}, ((f"{key}.normed1",), row), saves=(f"{key}.normed1",), weight=3 * h * h)
    result = {f"{key}.attention": row, f"{key}.lse": size.heads}
    kept = (qkv, *result)
    if spec.qk_norm:
        tape.split("unbind", qkv, 3 * row, *(f"{key}.{part}0" for part in "qkv"))
        if tape.ours:
            outs = {q: row, k: row}
            tape.add("qk_norm", outs, ((q + "0",), row), ((k + "0",), row), saves=(qkv,), weight=2 * spec.head_dim)
        else:
            for part in (q, k):
                # x², mean, reciprocal root, times x, times the weight: x, root and the unweighted product are kept
                unit, copies = {part + "u": size.wide, part + "r": size.heads}, dict[str, int]()
                if size.wide > row:  # on float32 copies of half precision
                    copies = {part + "c": size.wide, part + "w": spec.head_dim * 4}
                    unit |= copies
                tape.sizes |= unit
                tape.add(
                    "qk_norm", {part: row}, ((part + "0",), row), saves=(*unit, *(() if copies else (qkv,))),
                    temp=3 * size.wide, weight=spec.head_dim,
                )  # fmt: skip
        kept = (q, k, *kept)
        grads = (((q,), row), ((k,), row), ((f"{key}.v0",), row))
        tape.add("attention", result, *grads, saves=kept, temp=row if tape.ours else 0)
    elif tape.ours:
        tape.add("attention", result, ((qkv,), 3 * row), saves=kept, temp=row)
    else:
        tape.split("unbind", qkv, 3 * row, *(f"{key}.{part}0" for part in "qkv"))
        tape.add("attention", result, *(((f"{key}.{part}0",), row) for part in "qkv"), saves=kept)
    tape.add("proj", {f"{key}.proj": row}, ((f"{key}.attention",), row), saves=(f"{key}.attention",), weight=h * h + h)


def _write_mlp(tape: _Tape, spec: UViTSpec, size: _Sizes, key: str) -> None:
    h, hidden, row, wide = spec.width, spec.mlp_width, size.row, spec.mlp_ratio * size.row
    normed, pre, act, out = (f"{key}.{part}" for part in ("normed2", "pre", "act", "mlp"))
    if tape.ours:
        tape.add(
            "mlp", {out: row, pre: wide}, ((normed,), row), saves=(normed, pre), temp=2 * wide,
            weight=2 * h * hidden + hidden + h,
        )  # fmt: skip
        return
    tape.add("fc1", {pre: wide}, ((normed,), row), saves=(normed,), weight=h * hidden + hidden)
    tape.add("gelu", {act: wide}, ((pre,), wide), saves=(pre,))
    tape.add("fc2", {out: row}, ((act,), wide), saves=(act,), weight=h * hidden + h)


def _write_head(tape: _Tape, spec: UViTSpec, size: _Sizes, x: str, prediction: str) -> None:
    h, tape.unit, values = spec.width, "head", spec.patch**2 * spec.c_out
    tape.open(sum(p.numel for p in spec.parameters_of("head")))
    if spec.adaln:
        tape.modulation(size, h, spec.time_mlp, "head", ("shift1", "scale1"))
        tape.adaln(size, "head", "1", x)
    else:
        tape.norm(size, h, "head", "1", x)
    kept = ("head.normed1",)
    tape.add("linear", {"linear": size.linear}, (kept, size.row), saves=kept, weight=(h + 1) * values)
    tape.split("image tokens", "linear", size.linear, "rows")  # a view, whose gradient is put back among zeros
    tape.add("unpatchify", {"picture": size.out}, (("rows",), size.out))
    last = "picture"
    if spec.conv:
        weight = 9 * spec.c_out**2 + spec.c_out
        tape.add("conv", {"conv": size.out}, ((last,), size.out), saves=(last,), weight=weight)
        last = "conv"
    if size.target > size.out:
        tape.add("float", {"float": size.target}, ((last,), size.out))
        last = "float"
    tape.unit, tape.prediction = "loss", last
    if tape.ours:
        tape.sizes["slope"] = size.target  # the gradient, made in the forward pass
        tape.add("loss", {"loss": 0}, ((last,), size.target), saves=("slope",))
    else:
        tape.sizes["target"] = size.target if prediction == "v" else 0
        tape.add("loss", {"loss": 0}, ((last,), size.target), saves=(last, "target"), temp=size.target)


# --- the derivatives --------------------------------------------------------------------------------------------------


class _Held:
    """Which storages are there, how often each is held, and the most bytes that were there at once."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes, self.refs = sizes, dict[str, int]()
        self.live = self.peak = self.weights = self.weights_then = 0
        self.moment = ""

    def hold(self, name: str) -> None:
        count = self.refs.get(name, 0)
        self.refs[name] = count + 1
        self.live += 0 if count else self.sizes[name]

    def drop(self, name: str) -> None:
        self.refs[name] -= 1
        self.live -= 0 if self.refs[name] else self.sizes[name]

    def look(self, moment: str, besides: int = 0) -> None:
        if self.live + besides > self.peak:
            self.peak, self.weights_then, self.moment = self.live + besides, self.weights, moment


def _play(tape: _Tape, size: _Sizes, dtype_bytes: int, layout: Layout, gradients: Gradients) -> Activations:
    held = _Held(dict(tape.sizes))
    left: dict[int, int] = {}  # checkpointed block -> nodes whose derivatives still need something
    for node in tape.nodes:
        if node.frame is not None:
            left[node.frame] = left.get(node.frame, 0) + bool(node.saves)
        elif node.unit != "loss":
            for name in node.saves:
                held.hold(name)
    for name in (name for given in tape.frames.values() for name in given):
        held.hold(name)
    saved = held.live
    held.sizes["batch"] = 3 * size.noised + size.scalars
    held.hold("batch")
    held.hold(tape.prediction)
    batch = held.live - saved
    held.look("head", size.linear)
    loss = tape.nodes[-1]
    for name in loss.saves:
        held.hold(name)
    held.look("loss", size.target)
    grads = {"loss": "loss"}
    held.hold("loss")
    again: set[int] = set()
    for node in reversed(tape.nodes):
        if node.frame is not None and node.saves and node.frame not in again:  # computed again at the first need
            again.add(node.frame)
            for other in tape.nodes:
                if other.frame == node.frame:
                    for name in other.saves:
                        held.hold(name)
        _differentiate(held, node, grads, dtype_bytes, layout, gradients)
        if node.frame is not None and node.saves:
            left[node.frame] -= 1
            if not left[node.frame]:
                for name in tape.frames[node.frame]:
                    held.drop(name)
    return Activations(saved, batch, held.peak - saved - batch, held.weights_then, held.moment)


def _differentiate(
    held: _Held, node: _Node, grads: dict[str, str], dtype_bytes: int, layout: Layout, gradients: Gradients
) -> None:
    """One derivative: its gradients are made, the worst moment is looked at, then what it needed is dropped."""
    given = [grads.pop(name) for name in node.outs if name in grads]
    made: list[tuple[str, str]] = []
    if given:
        for at, (inputs, size) in enumerate(node.grads):
            storage = given[0]
            if size:
                storage = f"d{at} of {node.outs[0]}"
                held.sizes[storage] = size
            for name in inputs:
                held.hold(storage)
                made.append((name, storage))
    counted = dtype_bytes * (gradients != "apart")
    joined, own = (node.weight + node.joins * (layout == "flat")) * counted, 0
    held.live += joined
    held.weights += joined
    held.look(f"{node.unit} {node.name}", node.temp)
    if layout == "flat" and node.joins:
        own = node.joins * counted * (2 if gradients == "given" else 1)  # the pieces, and the whole unless it is kept
    elif layout == "named" and gradients == "given":
        own = joined
    held.live -= own
    held.weights -= own
    for name in (*node.saves, *given):
        held.drop(name)
    for name, storage in made:
        if name not in grads:
            grads[name] = storage
            continue
        both = f"sum of {name} {len(held.sizes)}"
        held.sizes[both] = held.sizes[name]
        held.hold(both)
        held.look(f"{node.unit} {node.name}, sum")
        held.drop(grads[name])
        held.drop(storage)
        grads[name] = both
