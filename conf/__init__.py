"""Hydra configuration groups: the yaml files beside this module."""
