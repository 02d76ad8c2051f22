"""The orthogonalisation of Muon's updates."""
