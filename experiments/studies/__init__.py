"""The claims of the lectures about alignment, each as one file that runs in minutes and says what did not reproduce."""
