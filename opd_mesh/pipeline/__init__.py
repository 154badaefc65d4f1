"""Pipelines: a base, specialists, and the student that unites them, as stages whose results are kept and used again.

A pipeline's recipe becomes a plan of jobs (:mod:`.plan`), every job has a digest of all that determines its result
(:mod:`.digests`), and what it leaves behind is an artefact under that digest (:mod:`.store`). :mod:`.run` does what is
not there yet.
"""
