"""Is this machine, or this cluster, fit for a run? Looks before anything starts, and needs no torch.

:mod:`.facts` looks, :mod:`.checks` judges what was found, :mod:`.examine` brings both together.
"""
