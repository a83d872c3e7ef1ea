"""The model that is trained: its weights as one vector, its optimizer steps, its loss."""
