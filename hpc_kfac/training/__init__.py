"""The application: tasks, models, data, the training loop. It uses only the library's public interface."""
