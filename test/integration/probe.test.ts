import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import type { FaultName } from '../../src/device/index.ts';
import { WIRE_REVISIONS } from '../../src/index.ts';
import { cleanUp, type DeviceSetup, directory, spawnDevice, startDevice } from './support.ts';
import { vipsec, vipsecProcess } from './vipsec.ts';

afterEach(cleanUp);

/** Milliseconds for what never comes. */
const PATIENCE: Partial<Record<FaultName, string>> = { 'reset-stuck': '300', 'admin-silent': '300' };

function patience(fault: FaultName): string[] {
  const ms = PATIENCE[fault];
  return ms === undefined ? [] : ['--timeout', ms];
}

async function probe(setup: DeviceSetup, args: string[] = []) {
  const { addresses } = await startDevice(setup);
  return vipsec(['probe', addresses[0], ...args]);
}

describe('vipsec probe', () => {
  test('prints features, administration commands and IPsec capabilities by name', async () => {
    const { addresses } = await spawnDevice({ mac: '02:00:00:00:00:09' });
    const { code, stdout, stderr } = await vipsecProcess(['probe', addresses[0]]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    for (const text of [
      /vendor:device +1af4:1041/,
      /COMMON +\d+ +0x[0-9a-f]+ +\d+/,
      /70 +VIRTIO_NET_F_IPSEC +yes/,
      /32 +VIRTIO_F_VERSION_1 +yes/,
      /0x8 +DEVICE_CAP_GET/,
      /0xa +RESOURCE_OBJ_CREATE/,
      /0x804 +NET_IPSEC_SA/,
      /ESP tunnel +AEAD +aes-gcm/,
      /AH transport/,
      /extended sequence numbers/,
      /mac +02:00:00:00:00:09/,
    ]) {
      expect(stdout).toMatch(text);
    }
    expect(stdout).not.toContain('Problems');
  });

  test.each(WIRE_REVISIONS)('gives the same as one JSON document, for %s', async (wire) => {
    const { code, stdout } = await probe({ wire }, ['--json']);
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    expect(stdout.trim().split('\n')).toHaveLength(1);
    expect(report.problems).toEqual([]);
    expect(report.pci).toMatchObject({ vendorId: 0x1af4, deviceId: 0x1041, virtioDeviceType: 1 });
    expect(report.pci.structures.map(({ name }: { name: string }) => name)).toEqual(
      expect.arrayContaining(['COMMON', 'NOTIFY', 'ISR', 'DEVICE']),
    );
    const offered = report.features.filter((feature: { offered: boolean }) => feature.offered);
    expect(offered).toContainEqual({ bit: 70, name: 'VIRTIO_NET_F_IPSEC', offered: true });
    expect(report.queues[0]).toMatchObject({ index: 0, name: 'receiveq1' });
    expect(report.admin.commands).toContainEqual({ opcode: 0xa, name: 'RESOURCE_OBJ_CREATE' });
    expect(report.ipsec.revision).toBe(wire);
    expect(report.ipsec.modes.map(({ name }: { name: string }) => name)).toEqual([
      'ESP tunnel',
      'ESP transport',
      'AH tunnel',
      'AH transport',
    ]);
    expect(report.flowFilter.actions).toContain('ipsec');
  });

  test('says of a plain function that it is one', async () => {
    const { code, stdout } = await probe({ ipsec: false });
    expect(code).toBe(0);
    expect(stdout).toMatch(/70 +VIRTIO_NET_F_IPSEC +-/);
    expect(stdout).toContain('the device does not offer it');
  });

  test('can be repeated: it leaves the function as it was', async () => {
    const { addresses } = await startDevice();
    const first = await vipsec(['probe', addresses[0], '--json']);
    const second = await vipsec(['probe', addresses[0], '--json']);
    expect(first.code).toBe(0);
    expect(second.stdout).toBe(first.stdout);
  });

  // What was read before the failure is in the report all the same.
  test.each<[FaultName, string, string]>([
    ['no-version-1', 'FEATURES_MISSING', 'features'],
    ['features-ok-refused', 'FEATURES_REJECTED', 'features'],
    ['reset-stuck', 'RESET_TIMEOUT', 'features'],
    ['capability-loop', 'CAPABILITY_LOOP', 'problems'],
    ['capability-outside-bar', 'STRUCTURE_BOUNDS', 'pci'],
    ['no-common-config', 'STRUCTURE_MISSING', 'pci'],
    ['queue-size-zero', 'QUEUE_SIZE', 'queues'],
    ['queue-size-odd', 'QUEUE_SIZE', 'queues'],
    ['admin-error', 'ADMIN_ENOMEM', 'queues'],
    ['admin-silent', 'ADMIN_TIMEOUT', 'queues'],
    ['capability-malformed', 'MALFORMED_CAPABILITY', 'admin'],
    ['used-id-bogus', 'USED_ID', 'queues'],
    ['config-unstable', 'CONFIG_UNSTABLE', 'features'],
    ['region-read-error', 'DEVICE_REFUSED', 'problems'],
  ])('a device with the fault %s gives the problem %s and the rest of the report', async (fault, code, part) => {
    const outcome = await probe({ faults: [fault] }, ['--json', ...patience(fault)]);
    expect(outcome.code).toBe(1);
    const report = JSON.parse(outcome.stdout);
    expect(report.problems[0].code).toBe(code);
    expect(report).toHaveProperty(part);
  });

  test('of nothing, or of something else than a vfio-user server, is one error line', async () => {
    const missing = await vipsec(['probe', `vfio-user:${join(directory(), 'none')}`]);
    expect(missing).toMatchObject({ code: 1, stdout: '' });
    expect(missing.stderr).toMatch(/^vipsec: error: .*\[CONNECT_FAILED\]\nhint: .*\n$/);
    const path = join(directory(), 'other');
    const server = createServer((socket) => {
      // The client leaves as soon as it sees what this is.
      socket.on('error', () => {});
      socket.end('HTTP/1.1 400 Bad Request\r\n\r\n');
    }).listen(path);
    try {
      const other = await vipsec(['probe', `vfio-user:${path}`]);
      expect(other).toMatchObject({ code: 1, stdout: '' });
      expect(other.stderr).toMatch(/^vipsec: error: .*\[[A-Z_]+\]\n/);
    } finally {
      server.close();
    }
  });
});
