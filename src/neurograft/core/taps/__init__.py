"""What do units hold, write and fire at while a model runs?"""
