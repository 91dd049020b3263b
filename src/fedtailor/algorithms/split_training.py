"""What split algorithms share: a client's ends of the model, the server's middle, and the steps that go between them.

    client  h1 = front(x)                                             up
    server  h2 = middle(h1)                                           down
    client  loss(back(h2), y), its step on the back; gradient of h2   up, unless nobody wants it
    server  its step on the middle; gradient of h1                    down, if the front trains
    client  its step on the front
Labels and texts stay at home; the attention mask goes up. split_rules.py says what tells one algorithm from another, split_client.py and
split_server.py are the two sides, split_middle.py is what the server computes, split_deltas.py what is sent where only changes are,
split_looks.py is the evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from fedtailor.algorithms import split_client, split_looks, split_middle
from fedtailor.algorithms.split_checks import check_of
from fedtailor.algorithms.split_rules import Ground
from fedtailor.core import Algorithm, ClientId, State, Talk, Tree


def split_algorithm(
    on: Ground,
    round: Callable[[State, list[ClientId]], Talk],
    model: Callable[[State], Tree],
    said: Callable[[State, ClientId], Tree],
    check: Callable[[Tree], None] = lambda params: None,
    more: Callable[[], State] = dict,
) -> Algorithm:
    """A split algorithm, from its round (of `split_server.steps`).

    Args:
        said: what a client is judged with: the middle, and the ends that are not its own.
        check: refuses trees that do not suit. `more`: what else its state has.
    """
    personal = functools.partial(split_client.personal, on)

    def init(params: Tree) -> State:
        check(params)
        trees: Tree = {name: {} for name in ("middles", "clients", "under_way", "drawn", "bases", "post")}
        begun = {"params": on.rules.start(params), "round": 0, "busy": [], **trees}
        return {**begun, **more()}

    def counted(state: State, cohort: list[ClientId]) -> Talk:
        after = yield from round(state, cohort)
        return {**after, "round": state["round"] + 1}

    return Algorithm(
        init=init,
        round=counted,
        client={**split_client.handlers(on), "middle": functools.partial(split_middle.middle, on), **split_looks.handlers(on)},
        answer=split_looks.answers(on, said),
        model=model,
        personal=personal,
        said=said,
        updates=False,
        splits=True,
        check=check_of(on),
    )


def own_middle(state: State, client: ClientId) -> Tree:
    """What a client is sent to judge itself where its ends are its own."""
    return {"middle": state["middles"][client]["params"]} if client in state["middles"] else {}
