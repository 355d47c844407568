// Makes the library importable, so that Python can find and load it. The ops register themselves.

#include <Python.h>

PyMODINIT_FUNC PyInit__C_cpu() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
