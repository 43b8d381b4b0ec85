import { readFileSync } from 'node:fs';

/**
 * What the kernel has mapped at `address`: the name of the file (`/memfd:…`), an empty string for anonymous memory, null for
 * nothing.
 */
export function backing(address: number): string | null {
  for (const line of readFileSync('/proc/self/maps', 'latin1').split('\n')) {
    const [range, , , , , ...name] = line.split(/ +/);
    const [start, end] = range.split('-').map((text) => Number.parseInt(text, 16));
    if (start <= address && address < end) return name.join(' ');
  }
  return null;
}
