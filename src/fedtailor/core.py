"""The seven words of fedtailor. Read this file first; an algorithm needs little else.

A round is a generator without input or output: it yields letters and is sent the replies. A client handler is a generator
too: it yields the heavy work (`Fit`, `Predict`) and is sent the results. An engine holds the conversation, so the same
algorithm runs in one process, stacked over many clients, or between many machines, and never knows which.

Laws, each one a contract test that every algorithm passes: server state between rounds is a plain value that can be saved;
a handler mutates nothing it was given; a reply holds no raw example; in memory == through the wire, bit for bit;
stacked == one by one within 1e-5; same seed, same result, whatever the order in which replies arrive.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

Tree: TypeAlias = dict[str, Any]  # tensors by name, nested dicts; also texts, numbers and lists of them
ClientId: TypeAlias = str
Batch: TypeAlias = Mapping[str, Tensor]
Forward: TypeAlias = Callable[[Tree, Batch], Tensor]  # (params, batch) -> logits
Loss: TypeAlias = Callable[[Forward, Tree, Batch, Tree], Tensor]  # (forward, params, batch, aux) -> scalar
State: TypeAlias = Tree

TARGETS = ("labels", "teacher")
"""What a batch holds for the loss and not for the model."""

SERVER: ClientId = "server"
"""A site beside the server itself: the held-out global test set, and, in simulation only, the pooled training data and a sample of
everybody's validation rows."""


class Message(NamedTuple):
    """What crosses the wire; nothing else does."""

    verb: str  # names the client handler that answers it
    body: Tree = {}
    info: Mapping[str, float] = {}  # numbers about the body: n, loss, step


class Examples(Protocol):
    """Encoded examples of one client: rows of a store that exists once for all clients."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (1 for images): what a batch of it costs."""
        ...

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Some of the rows, in this order."""
        ...

    def having(self, name: str, column: Tensor) -> Examples:
        """The same rows with one tensor more in each batch: a row of `column` an example."""
        ...

    def column(self, name: str) -> Tensor:
        """What every row has one of, such as the labels of a classifier: (rows, ...)."""
        ...

    def batch(self, rows: Sequence[int] | np.ndarray, width: int, size: int) -> dict[str, Tensor]:
        """The rows as tensors, padded to `width` tokens and to `size` rows (padding rows carry no label)."""
        ...


class Plan(NamedTuple):
    """How a Fit trains. Equal plans are stacked."""

    epochs: float = 1.0  # passes over the client's data; a fraction takes that part of it
    steps: int = 0  # when positive: exactly so many optimiser steps, whatever the data
    batch: int = 16
    optimizer: str = "adamw"  # adamw | adam | sgd
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: str = "constant"  # constant | linear | cosine, over the steps of one Fit
    decay: str = "constant"  # the same, from round to round; the engine applies it (`at`)
    rounds: int = 1  # over which the rate decays
    clip: float = 0.0  # norm of one client's gradient; 0 is no clipping
    dropout: bool = False  # the model's own dropout while training
    path: bool = False  # keep the params before each step, for who looks at the way and not at its end alone

    def at(self, round: int) -> Plan:
        """The plan of a round, counted from 1: its rate has come down as far as `decay` says."""
        rate = self.lr * falling(self.decay, (round - 1) / self.rounds)
        return self._replace(lr=rate, decay="constant", rounds=1)


def falling(shape: str, passed: float) -> float:
    """What is left of a rate when a share `passed` of the way is behind it: 1 at the start, 0 at the end unless constant."""
    if shape == "linear":
        return 1 - passed
    return 0.5 * (1 + math.cos(math.pi * passed)) if shape == "cosine" else 1.0


class Fit(NamedTuple):
    """Train `params` on `data`; answered with a `Fitted`."""

    loss: Loss  # module level, pure, no closure: equal losses are stacked
    params: Tree
    data: Examples
    aux: Tree = {}  # per-client tensors the loss reads: anchor, teacher, gradient
    plan: Plan = Plan()
    optimizer: Tree = {}  # optimiser state to go on with; tensors that it lacks start afresh
    passes: int = 1  # times that a step of the loss goes through the model and back, for the ledger
    reference: bool = (
        False  # of the server's model, where the client has another one: the params and the data are of that one then
    )


class Fitted(NamedTuple):
    params: Tree
    seen: Mapping[str, float]  # n (rows), steps, examples (passes), loss and lr (means over the steps), flops
    optimizer: Tree  # the optimiser's state after the last step
    path: Sequence[Tree] = ()  # the params before each step, where the plan keeps them


class Predict(NamedTuple):
    """Run `fn` over `data` without gradient; answered with its outputs, one row an example, in the data's order."""

    fn: Callable[[Forward, Tree, Batch], Tree]  # (forward, params, batch) -> tensors with a leading batch axis
    params: Tree
    data: Examples
    passes: int = 1  # forward passes that a row takes, for the ledger
    reference: bool = False  # as for Fit


class Work(NamedTuple):
    """Arithmetic that a handler does beside the model, for the ledger and the clock; answered with None."""

    flops: float


HIDDEN = "hidden_states"
"""In a batch: what the part of a cut model before this one has computed, (batch, tokens, width)."""


class Part(NamedTuple):
    """A part of a cut model: layers `start` to `stop` (exclusive); `first`: with what comes before all layers, `last`: with what comes
    after them."""

    start: int
    stop: int
    first: bool
    last: bool


class PartCost(NamedTuple):
    """What a part of a cut model costs who holds and trains it, for one step of rows x width."""

    memory: float  # bytes at the highest point, beyond the interpreter and its libraries
    weights: float  # bytes, of this part only
    trained: int  # numbers
    flops: float  # operations through and back
    held: float = 0.0  # bytes of `memory` that stay between steps: weights, trained tensors, their moments
    kept: float = 0.0  # bytes that wait for going back while other parts work
    forward: float = 0.0  # operations through alone
    tied: float = 0.0  # bytes of `weights` that the front has too: who holds both has them once


class Layers(NamedTuple):
    """How a technique's tree lies over the layers of its model, and what parts of it cost."""

    depth: int
    part: Callable[[Tree, Part], Tree]  # what of a whole tree belongs to a part
    whole: Callable[[Sequence[Tree]], Tree]  # the trees of the parts, front to back, as one
    least: int = 0  # layers that a front must have
    cost: Callable[[Part, int, int], PartCost] | None = None  # (part, rows, width) -> costs; counted when first asked for
    hidden: int = 0  # width of the hidden states between layers
    tokens: int = 0  # hidden states of an input, where that is not the width of the batch (images)
    read: int = 0  # tokens of the last layer's that the head reads; 0: all
    dtype: torch.dtype = torch.float32  # of the hidden states between layers


class Through(NamedTuple):
    """Run a part on a batch; answered with its outputs. What going back needs stays with the engine as long as it can."""

    part: Part
    params: Tree
    batch: Batch
    name: str  # of what stays
    inward: bool = True  # whether going back gives the gradient of the hidden states that came in
    back: bool = True  # whether anybody comes back; if nobody does, the outputs are the same bits whoever else is asked
    seed: int | None = (
        None  # with one the model's own dropout is on, and its masks are those of this seed; such a step is never stacked
    )


class Back(NamedTuple):
    """Go back through a part; answered with `Slopes`. What it needs and is no longer there is computed again."""

    of: Through
    gradient: Tensor  # of the outputs


class Slope(NamedTuple):
    """Loss and gradients at the part that has the labels; answered with `Slopes`."""

    loss: Loss
    part: Part
    params: Tree
    batch: Batch
    aux: Tree = {}
    seed: int | None = None  # as for Through


class Slopes(NamedTuple):
    """Gradients of the params and of the hidden states that came in, if any did."""

    params: Tree
    hidden: Tensor | None
    loss: float = 0.0


class Keep(NamedTuple):
    """Put tensors into the engine's cache; answered with whether they are all there: it has bounds, and may be lost at any time."""

    items: Mapping[str, Tensor]
    room: float  # bytes that the cache may take in all


class Recall(NamedTuple):
    """Answered with those tensors of these names that the cache has."""

    names: Sequence[str]


Step: TypeAlias = Through | Back | Slope | Keep | Recall
Ask: TypeAlias = Fit | Predict | Work | Step
Flow: TypeAlias = Generator[Ask | list[Step], Any, tuple[Tree | None, Message]]
"""A client handler, running: yields asks, or a list of steps that are done together; returns (own new state, reply)."""


class Letters(NamedTuple):
    """What a round yields. A plain mapping is the same as `wait="all"`."""

    to: Mapping[ClientId, Message]
    wait: str = "all"  # all: every reply before the deadline | any: as soon as one reply is there
    note: str = ""  # what the user should know


Talk: TypeAlias = Generator[Letters | Mapping[ClientId, Message], dict[ClientId, Message], Any]
"""A conversation of the server, running: yields letters, is sent the replies that arrived, returns the new state."""


LOST = "lost"
"""The verb of what an engine puts in the place of a reply that will not come, where a conversation takes replies as they come."""


def as_they_come(to: Mapping[ClientId, Message], note: str = "") -> Letters:
    """Send these letters (perhaps none) and go on as soon as any reply is there, also one asked for earlier."""
    return Letters(to, "any", note)


class Device(NamedTuple):
    """What a client runs on. Zero means "not limited" for memory and bandwidth."""

    name: str = "server-grade"
    flops: float = 0.0  # floating-point operations a second; 0: compute takes no simulated time
    memory: float = 0.0  # bytes
    uplink: float = 0.0  # bytes a second
    downlink: float = 0.0  # bytes a second
    latency: float = 0.0  # seconds, one way
    dropout: float = 0.0  # probability that a letter to this client is lost
    packet_loss: float = 0.0  # share of packets that are sent again, by a sender that does not slow down for it


class Reference(NamedTuple):
    """The server's model at a client that may have another one: clients that cannot compare their own models compare what this one says."""

    init: Tree  # its initial tree
    data: Mapping[str, Examples]  # the client's train and public rows, as this model reads them


class Site(NamedTuple):
    """What a client has and never sends."""

    id: ClientId
    data: Mapping[str, Examples]  # train, test, and valid or global where there is one
    init: Tree  # the technique's initial tree at this client (ranks and prefix lengths may differ)
    round: int = 0
    seed: int = 0
    device: Device = Device()
    number: int = 0  # its place among all clients: what is dealt to the clients in turn is dealt by it
    reference: Reference | None = None  # where clients differ in technique or backbone

    def random(self, purpose: str) -> torch.Generator:
        """The client's own random stream for this purpose in this round."""
        return stream(self.seed, purpose, self.id, self.round)


Handler: TypeAlias = Callable[[Tree | None, Message, Site], Flow]


class Algorithm(NamedTuple):
    """A value: a few functions; never a base class."""

    init: Callable[[Tree], State]  # technique's initial tree -> server state
    round: Callable[[State, list[ClientId]], Talk]  # a round with this cohort; returns the new state
    client: Mapping[str, Handler]  # verb -> handler
    answer: Callable[[State, list[ClientId]], Talk]  # evaluation is a conversation too; returns replies by client
    model: Callable[[State], Tree]  # the tree that a newcomer gets, and that is exported
    personal: Callable[[Tree | None, Tree, Site], Tree] | None = None  # (own, broadcast, site) -> a client's own tree
    said: Callable[[State, ClientId], Tree] | None = None  # that broadcast, where the letters of `answer` do not hold it
    trains: bool = True  # it moves tensors, so the technique must have some
    of_all_kinds: bool = (
        False  # clients may differ in technique and backbone: what crosses is not the trees, or what they have in common
    )
    splits: bool = False  # a client holds a part of the model only
    updates: bool = True  # a client's replies are of one tree: what a filter lost of one may be given with the next
    tells: Callable[[State], Tree] | None = (
        None  # what else belongs in a round's line and in the summary: numbers, perhaps by client
    )
    check: Callable[[Message, Message], str] | None = (
        None  # (letter, a stranger's reply) -> what is wrong with it; "" if nothing is
    )
    consult: Callable[[State, list[ClientId]], Talk] | None = None  # the server's test texts are put to these clients; returns
    # a tree a text: its answer ("scores" of the classes, or "text"), and the "passages" that it rests on


class Told(NamedTuple):
    """How likely a text is to a language model after another."""

    nll: float  # summed over its tokens
    tokens: int
    hits: int  # tokens that were the likeliest


class Reader(NamedTuple):
    """A language model beside the server that reads passages, the nearest first; the furthest are left out where they do not fit."""

    labels: Sequence[str] = ()  # what a class is called; none where the data has no classes
    read: Callable[[list[int]], str] = lambda tokens: ""  # tokens of the experiment's own model -> text
    score: Callable[[Sequence[str], str, Sequence[str]], list[Told]] = (
        lambda passages, question, answers: []
    )  # each answer after both
    write: Callable[[Sequence[str], str], str] = lambda passages, question: ""  # an answer


class Kind(NamedTuple):
    """Some of the clients, where they differ in technique or backbone: they are dealt to the kinds in turn, by their `Site.number`."""

    init: Tree  # their initial tree
    frozen: Tree  # what stands still beside it, and may be replaced under its names
    same: bool  # their backbone is the server's
    scaling: float = 1.0  # LoRA's alpha / r


class Job(NamedTuple):
    """What an experiment gives to every algorithm: an algorithm's other parameters are its own options."""

    loss: Loss
    judge: Callable[[Forward, Tree, Batch], Tree]  # per-example outputs for the metrics
    tally: Callable[[Tree], Tree]  # those outputs -> sums that can be added over clients
    plan: Plan = Plan()
    clients: int = 1  # all clients of the federation, not only a cohort
    device: str = "cpu"
    names: Sequence[ClientId] = ()  # theirs
    sizes: tuple[int, ...] = ()  # ranks or prefix lengths, of clients in turn; the initial tree has the largest
    exact_down: bool = True  # what the server sends arrives unrounded (no lossy filter)
    exact_up: bool = True  # what a client sends does, but for gradients
    valid: float = 0.1  # share of a client's rows that are for validation: a site's data["valid"]
    seed: int = 0  # of what is drawn at the server; a client draws from its site
    passes: Callable[[Sequence[Tree]], int] = len  # forward passes that a row takes to be judged with each of these trees
    classes: int = 0  # of the labels; 0 for language
    pixels: tuple[int, ...] = ()  # (channels, height, width), where the data are images
    public: int = 0  # examples that everybody has, where there are any: a site's data["public"]
    similar: Callable[[str], list[str]] = lambda word: []  # words that the model takes for like this one, the nearest first
    layers: Layers | None = None  # where the model has layers by which it can be cut
    hidden: int = 0  # width of the model's hidden states
    server: Device = Device("server")  # on the virtual clock
    reader: Reader | None = None  # what reads retrieved passages, where the technique has one
    kinds: tuple[Kind, ...] = ()  # of clients; () where all have what the server has
    frozen: Tree = {}  # a Kind's, of the server's technique
    scaling: float = 1.0  # the same


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for (seed, purpose, client, round): streams are derived, never shared."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """A random stream of its own for this seed and purpose."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def one_exchange(
    serve: Callable[[State, ClientId], Message],
    merge: Callable[[State, dict[ClientId, Message]], State],
) -> Callable[[State, list[ClientId]], Talk]:
    """The common round: one letter to each client of the cohort, one merge of what came back (in client order)."""

    def round(state: State, cohort: list[ClientId]) -> Talk:
        replies = yield {client: serve(state, client) for client in cohort}
        # A client may fail: the inbox is a subset of the outbox, and an empty one changes nothing.
        return merge(state, {c: replies[c] for c in sorted(replies)}) if replies else state

    return round


def answer_with(
    job: Job,
    broadcast: Callable[[State], Tree],
    personal: Callable[[Tree | None, Tree, Site], Tree] | None = None,
    student: Callable[[State], Tree] | None = None,
) -> tuple[Callable[[State, list[ClientId]], Talk], Handler]:
    """Evaluation in one exchange: (the server's conversation, the client's handler for the verb "answer").

    Without `personal` the server's own tree is judged, once on its test set and once on each client's test split.
    With it each client judges its personal tree on its own split and on its sample of the global test set; a `student` that the
    server has beside them is judged there, and sent to nobody.
    """

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        letter = Message("answer", broadcast(state))
        letters = dict.fromkeys(cohort if personal else [*cohort, SERVER], letter)
        if student:
            letters[SERVER] = Message("answer", student(state))
        return (yield letters)

    def handler(own: Tree | None, msg: Message, site: Site) -> Flow:
        params = personal(own, msg.body, site) if personal and site.id != SERVER else msg.body
        body: Tree = {}
        for split in ("test", "global"):
            if split in site.data and len(site.data[split]):
                outputs = yield Predict(job.judge, params, site.data[split])
                body[split] = job.tally(outputs)
        return own, Message("judged", body, {"n": float(len(site.data.get("test", ())))})

    return answer, handler
