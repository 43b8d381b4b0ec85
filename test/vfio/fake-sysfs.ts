/**
 * A folder that looks like sysfs and procfs with a few PCI functions, and a kernel that answers writes to it: what
 * `bind.ts` relies on, without root. The real kernel is asked in qemu-test/scenarios/vfio-bind.ts.
 */
import { mkdirSync, mkdtempSync, readFileSync, readlinkSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';

export interface FakeFunction {
  readonly address: string;
  readonly ids?: readonly [number, number];
  readonly class?: number;
  readonly driver?: string;
  readonly group?: string;
  readonly interface?: string;
}

export class FakeSysfs {
  readonly root = mkdtempSync(join(tmpdir(), 'vipsec-sysfs-'));
  readonly files = { sys: join(this.root, 'sys'), proc: join(this.root, 'proc') };
  /** Drivers that the kernel would choose by itself. */
  readonly #natural = new Map<string, string>();
  /** What was written, as `NAME TEXT`. */
  readonly writes: string[] = [];
  /** False: vfio-pci refuses every function. */
  vfioTakes = true;

  constructor(functions: readonly FakeFunction[], drivers: readonly string[] = ['virtio-pci', 'vfio-pci']) {
    for (const driver of drivers) mkdirSync(this.#driver(driver), { recursive: true });
    for (const fn of functions) this.#add(fn);
    mkdirSync(join(this.files.proc, 'net'), { recursive: true });
    mkdirSync(join(this.files.sys, 'class/net'), { recursive: true });
  }

  device(address: string): string {
    return join(this.files.sys, 'bus/pci/devices', address);
  }

  proc(path: string, text: string): void {
    const target = join(this.files.proc, path);
    mkdirSync(join(target, '..'), { recursive: true });
    writeFileSync(target, text);
  }

  /** Interface `upper` is made of `lower`. */
  stack(upper: string, lower: string): void {
    mkdirSync(join(this.files.sys, 'class/net', upper, `lower_${lower}`), { recursive: true });
  }

  /** Process `pid` has `path` open. */
  openFile(pid: number, path: string): void {
    mkdirSync(join(this.files.proc, String(pid), 'fd'), { recursive: true });
    symlinkSync(path, join(this.files.proc, String(pid), 'fd/7'));
  }

  /** The `write` of BindOptions: does what the kernel does. */
  readonly write = (path: string, text: string): void => {
    this.writes.push(`${basename(path)} ${text.trim()}`);
    if (basename(path) === 'driver_override') writeFileSync(path, text.trim());
    else if (basename(path) === 'unbind') rmSync(join(this.device(text), 'driver'));
    else if (basename(path) === 'drivers_probe') this.#probe(text);
    else throw new Error(`nothing writes ${path}`);
  };

  remove(): void {
    rmSync(this.root, { recursive: true, force: true });
  }

  #probe(address: string): void {
    const device = this.device(address);
    if (driverOf(device) !== undefined) return;
    const override = readFileSync(join(device, 'driver_override'), 'utf8');
    const driver = override === '' ? this.#natural.get(address) : override;
    if (driver === undefined || (driver === 'vfio-pci' && !this.vfioTakes)) return;
    symlinkSync(this.#driver(driver), join(device, 'driver'));
  }

  #driver(name: string): string {
    return join(this.files.sys, 'bus/pci/drivers', name);
  }

  #add(fn: FakeFunction): void {
    const device = this.device(fn.address);
    const { ids = [0x1af4, 0x1041], driver, group } = fn;
    mkdirSync(device, { recursive: true });
    const hex = (name: string, value: number) => writeFileSync(join(device, name), `0x${value.toString(16)}\n`);
    hex('vendor', ids[0]);
    hex('device', ids[1]);
    hex('subsystem_vendor', ids[0]);
    hex('subsystem_device', 0x1100);
    hex('class', fn.class ?? 0x020000);
    writeFileSync(join(device, 'driver_override'), '');
    if (driver !== undefined) {
      mkdirSync(this.#driver(driver), { recursive: true });
      symlinkSync(this.#driver(driver), join(device, 'driver'));
      if (driver !== 'vfio-pci') this.#natural.set(fn.address, driver);
    }
    if (fn.interface !== undefined) mkdirSync(join(device, 'virtio0/net', fn.interface), { recursive: true });
    if (group === undefined) return;
    const home = join(this.files.sys, 'kernel/iommu_groups', group);
    mkdirSync(join(home, 'devices'), { recursive: true });
    symlinkSync(device, join(home, 'devices', fn.address));
    symlinkSync(home, join(device, 'iommu_group'));
  }
}

function driverOf(device: string): string | undefined {
  try {
    return readlinkSync(join(device, 'driver'));
  } catch {
    return undefined;
  }
}
