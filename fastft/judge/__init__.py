"""The judge: models answer questions, a stronger model compares the answers, figures say how sure that is."""
