/**
 * The demo: two software devices on one wire, one with IPsec and one without, each opened by the driver.
 *
 * ```
 *   east: NIC with VIRTIO_NET_F_IPSEC        wire (we hold it)        west: plain NIC
 *   SA objects over the administration       a capture of all         the same SAs
 *   queue; the device encrypts               that passes              in software
 * ```
 *
 * Real packets cross both ways and are compared byte by byte; then a packet is sent again and another is changed on the
 * wire, and both ends must refuse them and go on. Everything that was started or made is gone afterwards.
 */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { CaptureWriter, LinkType, type Nic, openNic, VfioError, validateSa } from '../../src/index.ts';
import { writeEspKeys } from '../esp-keys.ts';
import { makeTunnels, type Tunnel, validated, wipeTunnels } from './associations.ts';
import { DeviceProcess } from './device-process.ts';
import { Exchange, type ExchangeOptions, type Measured, RING } from './exchange.ts';
import { type Check, type DemoReport, judge } from './report.ts';
import { type OwnedSa, Station } from './station.ts';
import { loadTraffic, type Traffic } from './traffic.ts';
import { askTshark } from './tshark.ts';
import { SIDES, type Side, Wire } from './wire.ts';

export interface DemoOptions extends ExchangeOptions {
  /** Where to leave the capture of the wire and the decryption file; `undefined`: nowhere. */
  readonly out: string | undefined;
}

/** Milliseconds for both devices to connect to the wire. */
const CONNECT = 60_000;

/** Runs the demo from nothing to nothing. Throws what went wrong on the way; wrong numbers are in the report. */
export async function runDemo(options: DemoOptions): Promise<DemoReport> {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-demo-'));
  const tunnels = makeTunnels();
  try {
    const place = options.out ?? folder;
    mkdirSync(place, { recursive: true });
    const files = { capture: join(place, 'wire.pcap'), keys: join(place, 'esp_sa') };
    const result = await onWire(folder, files.capture, tunnels, options);
    writeEspKeys(files.keys, validated(tunnels));
    options.progress(() => 'tshark');
    const tshark = await askTshark(files.capture, files.keys, join(folder, 'tshark'));
    if (tshark !== null) result.checks.push(...tsharkChecks(tshark, result));
    const checks = judge(result.checks);
    return {
      ...result,
      ok: checks.every(({ ok }) => ok),
      tshark,
      checks,
      files: options.out === undefined ? [] : Object.values(files),
    };
  } finally {
    wipeTunnels(tunnels);
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Starts devices and wire, and stops them whatever happens. */
async function onWire(
  folder: string,
  capture: string,
  tunnels: readonly Tunnel[],
  options: DemoOptions,
): Promise<Measured> {
  const traffic = loadTraffic();
  using writer = new CaptureWriter(capture, { linkType: LinkType.ethernet, nanoseconds: true });
  const ends = [join(folder, 'east.wire'), join(folder, 'west.wire')] as const;
  const wire = await Wire.listen(ends, writer);
  const devices: DeviceProcess[] = [];
  try {
    options.progress(() => 'starting two software devices');
    devices.push(new DeviceProcess(join(folder, 'east.sock'), ['--link', `unix-connect:${ends[0]}`]));
    devices.push(new DeviceProcess(join(folder, 'west.sock'), ['--link', `unix-connect:${ends[1]}`, '--no-ipsec']));
    await Promise.all(devices.map((device) => device.ready()));
    await until(() => wire.connected, CONNECT, 'the devices did not connect to the wire');
    return await withNics(devices, wire, tunnels, traffic, options);
  } finally {
    await Promise.all(devices.map((device) => device.stop()));
    await wire.close();
  }
}

async function withNics(
  devices: readonly DeviceProcess[],
  wire: Wire,
  tunnels: readonly Tunnel[],
  traffic: Traffic,
  options: DemoOptions,
): Promise<Measured> {
  const nics: Nic[] = [];
  try {
    for (const device of devices) nics.push(await openNic(`vfio-user:${device.socket}`, { queueSize: RING }));
    const [east, west] = await Promise.all(SIDES.map((side) => station(nics[side], side, tunnels)));
    return await new Exchange([east, west], wire, devices[0], options).run(traffic);
  } finally {
    await Promise.all(nics.map((nic) => nic.close()));
  }
}

/** Gives a NIC its SAs. */
async function station(nic: Nic, side: Side, tunnels: readonly Tunnel[]): Promise<Station> {
  const add = async (input: Tunnel['outbound']): Promise<OwnedSa> => ({
    handle: await nic.ipsec.addSa(input),
    sa: validateSa(input),
  });
  const outbound: OwnedSa[] = [];
  const inbound: OwnedSa[] = [];
  for (const tunnel of tunnels) {
    if (tunnel.from === side) outbound.push(await add(tunnel.outbound));
    else inbound.push(await add(tunnel.inbound));
  }
  return new Station(nic, outbound, inbound);
}

function tsharkChecks(tshark: NonNullable<DemoReport['tshark']>, result: Measured): Check[] {
  // What was replayed is on the wire once more.
  const esp = result.wire.esp + result.replayed;
  return [
    { what: 'tshark: ESP packets', expected: esp, actual: tshark.esp },
    {
      what: 'tshark: decrypted, ICV right',
      expected: esp - result.corrupted,
      actual: tshark.authentic,
    },
    { what: 'tshark: ICV wrong', expected: result.corrupted, actual: tshark.wrong },
    { what: 'tshark: packets in the clear', expected: result.wire.clear, actual: tshark.clear },
  ];
}

async function until(condition: () => boolean, milliseconds: number, otherwise: string): Promise<void> {
  const deadline = Date.now() + milliseconds;
  while (!condition()) {
    if (Date.now() > deadline) throw new VfioError('DEMO', otherwise);
    await sleep(10);
  }
}
