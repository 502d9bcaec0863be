"""Saving and publishing: what a saved folder needs, model cards, and folders on the Hub."""

from .connection import check_available, connected, unreachable
from .model_card import CardFacts, build_card, carry_over, join_cards, read_card, source_file, write_card
from .publish import BackgroundUploads, check_save_directory, publish_folder, push
from .saved_weights import check_loads_again


__all__ = [
    "BackgroundUploads",
    "CardFacts",
    "build_card",
    "carry_over",
    "check_available",
    "check_loads_again",
    "check_save_directory",
    "connected",
    "join_cards",
    "publish_folder",
    "push",
    "read_card",
    "source_file",
    "unreachable",
    "write_card",
]
