"""Networks on an accelerator: few launches, few synchronisations, and a stand-in device that counts both."""
