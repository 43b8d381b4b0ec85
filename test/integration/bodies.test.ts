/**
 * The bodies of the QEMU scenarios over `vfio-user:`: what runs in a guest on QEMU's virtio-net and on the IPsec function, here without one.
 */
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { arenaBody, arenaName } from '../../qemu-test/bodies/arenas.ts';
import { flowBody, flowChecks } from '../../qemu-test/bodies/flows.ts';
import { IpsecCheck, ipsecBody } from '../../qemu-test/bodies/ipsec.ts';
import { NicCheck, nicBody } from '../../qemu-test/bodies/nic.ts';
import type { Place } from '../../qemu-test/bodies/place.ts';
import { usoBody, usoName } from '../../qemu-test/bodies/uso.ts';
import { WireEnd } from '../../qemu-test/bodies/wire.ts';
import { FlowCrew, workerBody, workerChecks } from '../../qemu-test/bodies/workers.ts';
import { FramePort } from '../../qemu-test/host/frames.ts';
import { Feature, WIRE_REVISIONS } from '../../src/index.ts';
import { cleanUp, type DeviceSetup, directory, spoken, startDevice } from './support.ts';

const MAC = '52:54:00:00:0c:01';
const ports: FramePort[] = [];
const crews: FlowCrew[] = [];

afterEach(async () => {
  for (const port of ports.splice(0)) port.close();
  for (const crew of crews.splice(0)) await crew.end();
  await cleanUp();
});

/** A device process as a place; `made` becomes the names of the checks that were made. */
async function placeOn(setup: DeviceSetup, made: string[]): Promise<Place> {
  const link = join(directory(), 'wire.sock');
  const device = await startDevice({ ...setup, link: `unix:${link}`, mac: MAC });
  const port = await FramePort.connect(link);
  ports.push(port);
  const wire = new WireEnd(port, (up) => (up ? port.plug() : port.unplug()));
  return {
    address: device.addresses[0],
    // No check is followed by others: the first that fails is what is shown.
    check: async (name, body) => {
      await body();
      made.push(name);
      return true;
    },
    wire: (request) => wire.serve(request),
  };
}

describe.each(WIRE_REVISIONS)('the bodies of the QEMU scenarios over vfio-user, %s', (wire) => {
  it.each(['split', 'packed'] as const)(
    'move frames, wait, follow the link and reset: %s virtqueues',
    async (rings) => {
      const made: string[] = [];
      const setup = { rings, wire };
      await nicBody(await placeOn(setup, made), { mac: MAC, mtu: 1500, options: spoken(setup) });
      expect(made.sort()).toEqual(Object.values(NicCheck).sort());
    },
  );

  it.each(['inline', 'software'] as const)('protect packets %s', async (where) => {
    const made: string[] = [];
    const setup = { wire, ...(where === 'software' ? { ipsec: false } : {}) };
    const options = where === 'inline' ? { ...spoken(setup), ipsec: where } : {};
    await ipsecBody(await placeOn(setup, made), where, options);
    expect(made.sort()).toEqual(Object.values(IpsecCheck).sort());
  });
});

describe('the matrix of rings, queues and waiting over vfio-user', () => {
  it.each(['split', 'packed'] as const)(
    'loses no datagram and follows RSS, in worker threads and from memory of the application too: %s virtqueues',
    async (ring) => {
      const made: string[] = [];
      const place = await placeOn({ rings: ring, queuePairs: 2 }, made);
      await place.wire({ kind: 'echo', how: 'reflect' });
      const peer = { mac: Uint8Array.of(2, 0, 0, 0, 0, 1), address: [10, 8, 0, 1], own: [10, 8, 0, 2] };
      const features = [Feature.CSUM, Feature.GUEST_CSUM, Feature.MRG_RXBUF, Feature.RING_RESET];
      await flowBody(place, { ring, pairs: 2, peer, features });
      const crew = new FlowCrew();
      crews.push(crew);
      await workerBody(place, crew, { ring, peer, features: [Feature.MQ, Feature.RING_RESET], doorbell: 'eventfd' });
      await arenaBody(place, ring, peer);
      await usoBody(place, ring, peer);
      const all = [...flowChecks(ring, 2), ...workerChecks(ring), arenaName(ring), usoName(ring)];
      expect(made.sort()).toEqual(all.sort());
    },
  );
});
