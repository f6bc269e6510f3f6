"""What is computed that knows nothing of models?"""
