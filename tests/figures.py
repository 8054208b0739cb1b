"""Figures that tests print, for people: ``make figures`` runs those tests and shows these lines."""

from __future__ import annotations


def figure(text: str) -> None:
    print(f"\nfigure: {text}", flush=True)
