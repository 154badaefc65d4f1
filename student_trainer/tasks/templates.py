"""A domain's templates, of an item's question, metadata and gold answer."""

from __future__ import annotations

from opd_mesh.templates import TextTemplate
from student_trainer.tasks.items import Item


class ItemTemplate(TextTemplate):
    """One template of a domain."""

    def of(self, item: Item) -> str:
        """The text for an item. ``answer`` is not among the names where the item has none."""
        known = {"question": item.question, "metadata": item.metadata}
        return self.render(**known if item.answer is None else known | {"answer": item.answer})


def compiled(text: str | None, field: str) -> ItemTemplate | None:
    """Of a key that may be unset."""
    return None if text is None else ItemTemplate(text, field)
