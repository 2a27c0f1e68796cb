#include <cstdio>
int main() { std::puts("latente"); }
