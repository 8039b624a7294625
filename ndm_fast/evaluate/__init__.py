"""Do the subspaces carry the model's variables?"""
