// What stub_compiler.sh compiles instead of a source.
int main() {}
