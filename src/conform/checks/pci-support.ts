/** Virtio capabilities in configuration space, as checks look at them. */
import type { VirtioCapability } from '../../vfio/config-space.ts';
import type { Bench } from '../bench.ts';
import { expect, hex, need } from '../check.ts';

/** The capabilities of a type, logged. */
export function capabilities(bench: Bench, type: number): readonly VirtioCapability[] {
  const found = bench.target.structures.virtio.filter((cap) => cap.type === type);
  for (const { at, bar, offset, length, extra } of found) {
    bench.log(
      `capability at ${hex(at)}: type ${type}, BAR ${bar}, offset ${hex(offset)}, length ${length}, ${extra.length} extra bytes`,
    );
  }
  return found;
}

/** There is a capability of a type. */
export function expectPresent(bench: Bench, type: number, name: string): void {
  expect(capabilities(bench, type).length > 0, `there is no ${name} capability`);
}

/** The structures of a type, of which there must be one, are aligned. */
export function expectAligned(bench: Bench, type: number, name: string, alignment: number): void {
  const found = capabilities(bench, type);
  need(found.length > 0, `there is no ${name} capability`);
  for (const { at, offset } of found) {
    expect(
      offset % alignment === 0,
      `the offset ${hex(offset)} of capability ${hex(at)} is not a multiple of ${alignment}`,
    );
  }
}
