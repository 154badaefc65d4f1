"""Tasks: prompts of a domain in splits that cannot overlap, gold answers, verifiers, and reasoning efforts."""

from student_trainer.tasks.domain import Domain, open_domains
from student_trainer.tasks.grader import Grader
from student_trainer.tasks.items import Item, Prompt
from student_trainer.tasks.shares import allot, next_prompts
from student_trainer.tasks.verifiers import Grade

__all__ = ["Domain", "Grade", "Grader", "Item", "Prompt", "allot", "next_prompts", "open_domains"]
