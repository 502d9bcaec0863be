"""Publishing: model cards, and folders on the Hub."""

from .model_card import CardFacts, build_card, carry_over, join_cards, read_card, source_file, write_card
from .publish import BackgroundUploads, publish_folder


__all__ = [
    "BackgroundUploads",
    "CardFacts",
    "build_card",
    "carry_over",
    "join_cards",
    "publish_folder",
    "read_card",
    "source_file",
    "write_card",
]
