"""Algorithms: one file a paper. `ALGORITHMS` is the one registry; an algorithm's signature is its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtailor.algorithms.adaptive import adaptive_prefix
from fedtailor.algorithms.apfl import apfl
from fedtailor.algorithms.baselines import local, pooled, zero_shot
from fedtailor.algorithms.ddome import ddome
from fedtailor.algorithms.distil import distil
from fedtailor.algorithms.ditto import ditto
from fedtailor.algorithms.dypfl import dypfl
from fedtailor.algorithms.fed_influence import fed_influence
from fedtailor.algorithms.fedala import fedala
from fedtailor.algorithms.fedavg import fedadagrad, fedadam, fedavg, fedavgm, fedyogi
from fedtailor.algorithms.fedbasis import fedbasis
from fedtailor.algorithms.fedbuff import asynchronous
from fedtailor.algorithms.fedex import fedex
from fedtailor.algorithms.fedfomo import fedfomo
from fedtailor.algorithms.fedlc import fedlc
from fedtailor.algorithms.fedmosaic import fedmosaic
from fedtailor.algorithms.fedper import fedper
from fedtailor.algorithms.fedppa import fedppa
from fedtailor.algorithms.fedprox import fedprox
from fedtailor.algorithms.fedrep import fedrep
from fedtailor.algorithms.finetune import fedbabu, finetune
from fedtailor.algorithms.flexp import flexp
from fedtailor.algorithms.flora import flora
from fedtailor.algorithms.fml import fml
from fedtailor.algorithms.hetlora import hetlora
from fedtailor.algorithms.lora_averaging import fedit, fedsa, ffa
from fedtailor.algorithms.pac_pfl import pac_pfl
from fedtailor.algorithms.pfedpg import pfedpg
from fedtailor.algorithms.pfedpt import pfedpt
from fedtailor.algorithms.pfsl import pfsl
from fedtailor.algorithms.phsfl import phsfl
from fedtailor.algorithms.prompt_search import prompt_search
from fedtailor.algorithms.rag import rag
from fedtailor.algorithms.scaffold import scaffold
from fedtailor.algorithms.splitfed import splitfed, splitlora
from fedtailor.algorithms.zeroth_order import zeroth_order
from fedtailor.algorithms.zoopfl import zoopfl
from fedtailor.core import Algorithm

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "adaptive-prefix": adaptive_prefix,
    "apfl": apfl,
    "asynchronous": asynchronous,
    "ddome": ddome,
    "distil": distil,
    "ditto": ditto,
    "dypfl": dypfl,
    "fed_influence": fed_influence,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedala": fedala,
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedbabu": fedbabu,
    "fedbasis": fedbasis,
    "fedex": fedex,
    "fedfomo": fedfomo,
    "fedit": fedit,
    "fedlc": fedlc,
    "fedmosaic": fedmosaic,
    "fedper": fedper,
    "fedppa": fedppa,
    "fedprox": fedprox,
    "fedrep": fedrep,
    "fedsa": fedsa,
    "fedyogi": fedyogi,
    "ffa": ffa,
    "finetune": finetune,
    "flexp": flexp,
    "flora": flora,
    "fml": fml,
    "hetlora": hetlora,
    "local": local,
    "pac_pfl": pac_pfl,
    "pfedpg": pfedpg,
    "pfedpt": pfedpt,
    "pfsl": pfsl,
    "phsfl": phsfl,
    "pooled": pooled,
    "prompt-search": prompt_search,
    "rag": rag,
    "scaffold": scaffold,
    "splitfed": splitfed,
    "splitlora": splitlora,
    "zero-shot": zero_shot,
    "zeroth-order": zeroth_order,
    "zoopfl": zoopfl,
}

__all__ = ["ALGORITHMS"]
