"""The judge: questions are answered by models, answers are compared by a stronger model, and the figures say how sure they are."""
