/**
 * Drives a NIC as fast as it can, both ways, until it is killed: `node flood.js ADDRESS`. Says `running` once packets have
 * gone both ways.
 */
import { openNic } from '../../src/index.ts';
import { poll, testFrame } from '../bodies/frames.ts';

const BURST = 64;
const ENOUGH = 200;

const nic = await openNic(process.argv[2] ?? '');
const { packets } = nic;
const [{ rx, tx }] = nic.queues;
const burst = new Uint32Array(BURST);
const frame = testFrame('nic', 0, nic.mtu);
let received = 0;
let said = false;
await poll(
  () => {
    if (nic.broken !== null) throw nic.broken;
    const n = rx.burst(burst, BURST);
    packets.free(burst, n);
    received += n;
    tx.reclaim();
    const m = packets.allocate(burst, Math.min(BURST, tx.room));
    for (let i = 0; i < m; i++) packets.write(burst[i], frame);
    const taken = tx.burst(burst, m);
    if (taken < m) packets.free(burst.subarray(taken), m - taken);
    if (!said && received >= ENOUGH && nic.statistics().tx.packets >= ENOUGH) {
      said = true;
      process.stdout.write('running\n');
    }
    return false;
  },
  600_000,
  'flooding',
);
