"""The type checker of the test run: every function of c2r checks its annotations, shapes included, as it is called."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 has it
