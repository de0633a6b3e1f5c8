"""A package of its own: torch-fidelity, a judge here, installs one named tests too, which Python would find instead."""
