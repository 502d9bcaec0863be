"""Publishing: model cards, and folders on the Hub."""

from .model_card import CardFacts, build_card, join_cards, write_card
from .publish import publish_folder


__all__ = ["CardFacts", "build_card", "join_cards", "publish_folder", "write_card"]
