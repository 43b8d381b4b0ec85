/**
 * The traffic of the demo: real packets from the captures of `test/data`, split by who sent them.
 */
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { CaptureReader, Ethernet, InputError } from '../../src/index.ts';
import { packageRoot } from '../package-root.ts';
import type { Side } from './wire.ts';

/** The client of the captures, whose frames leave from side 0; everybody else's leave from side 1. */
const CLIENT_MAC = [2, 0, 0, 0, 0, 1];

/** The address ranges of the captures: what is to be protected. */
export const Network = { ipv4: '10.10.0.0/24', ipv6: 'fd00:10::/64' } as const;

/** Frames in the order of sending, for each side. */
export type Traffic = readonly [readonly Uint8Array[], readonly Uint8Array[]];

/** Reads all captures. Throws `InputError` when there are none. */
export function loadTraffic(folder = join(packageRoot(), 'test', 'data')): Traffic {
  const frames: [Uint8Array[], Uint8Array[]] = [[], []];
  for (const name of readdirSync(folder).sort()) {
    if (!name.endsWith('.pcap')) continue;
    using reader = new CaptureReader(join(folder, name));
    for (const record of reader) {
      const frame = record.bytes();
      if (frame.length >= Ethernet.length) frames[sender(frame)].push(frame);
    }
  }
  if (frames[0].length === 0 || frames[1].length === 0) {
    throw new InputError('NO_TRAFFIC', `${folder} holds no captures of two hosts`);
  }
  return frames;
}

function sender(frame: Uint8Array): Side {
  return CLIENT_MAC.every((byte, i) => frame[Ethernet.source + i] === byte) ? 0 : 1;
}
