"""The lean runtime: schedules the stages of the cascade over compiled engines, with NumPy arrays in and out."""
