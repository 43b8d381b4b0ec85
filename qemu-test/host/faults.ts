/** Lines of the guest's console that no correct run prints: the kernel as a judge of the driver and the device. */

const FAULTS: readonly RegExp[] = [
  // The IOMMU stopped a DMA, or could not work.
  /DMAR: .*(?:fault|Fault|DMAR hardware is malfunctioning)/,
  /\bBUG: /,
  /\bOops: /,
  /WARNING: CPU/,
  /Kernel panic/,
  /Call Trace:/,
  /Out of memory: Killed process/,
  /init: module .* does not load/,
  /\bAER: .*error/i,
];

export function consoleFaults(lines: readonly string[], allowed: readonly RegExp[]): string[] {
  return lines.filter((line) => FAULTS.some((fault) => fault.test(line)) && !allowed.some((a) => a.test(line)));
}
